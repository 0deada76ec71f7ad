"""Whether the money of both databases agrees."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from examples.orders.database import Database
from examples.orders.orders import OrderService
from examples.orders.steps import name_of

START = sum(OrderService.accounts.values())


class Books(NamedTuple):
    """What both databases say. orders: the amount of each. closed: ids. payments: order and amount of each."""

    customers: int
    orders: dict[str, int]
    closed: set[str]
    till: int
    payments: list[tuple[str, int]]

    def balances(self) -> str:
        booked = {order for order, _ in self.payments}
        money = sum(amount for order, amount in self.orders.items() if order not in booked)
        placed, done = len(self.orders), len(self.closed)
        return (
            f"order service    customers have {self.customers}, {done} of {placed} orders closed\n"
            f"payment service  till has {self.till}, from {len(self.payments)} payments\n"
            f"under way        {money} in money, {placed - done} orders not closed\n"
            f"together         {self.customers + self.till + money} of {START}"
        )

    def faults(self) -> list[str]:
        """Return in words what must never be."""
        times = Counter(order for order, _ in self.payments)
        found = [f"{name_of(order)} is paid {count} times" for order, count in times.items() if count > 1]
        found += [
            f"a payment of {amount} for {name_of(order)}, ordered for {self.orders.get(order, 'nothing')}"
            for order, amount in self.payments
            if self.orders.get(order) != amount
        ]
        found += [f"{name_of(order)} is closed, and not paid" for order in self.closed - times.keys()]
        if self.customers + sum(self.orders.values()) != START:
            found.append("what the customers have, and what they ordered, is not what they had")
        if self.till != sum(amount for _, amount in self.payments):
            found.append("the till is not the sum of the payments")
        return found


def read_books(orders: Database, payments: Database) -> Books:
    """Read both databases, also while the services work."""
    # In this order: what is closed was paid before, and what is paid was placed before.
    [closed] = _read(orders, "SELECT id FROM orders WHERE state = 'paid'")
    till, paid = _read(payments, "SELECT balance FROM accounts", "SELECT order_id, amount FROM payments")
    customers, placed = _read(orders, "SELECT SUM(balance) FROM accounts", "SELECT id, amount FROM orders")
    return Books(
        customers=int(customers[0][0]),
        orders=dict(placed),
        closed={order for (order,) in closed},
        till=till[0][0],
        payments=paid,
    )


def _read(database: Database, *statements: str) -> list[list[Any]]:
    """Run several SELECTs on one state of a database."""
    with database.transaction() as transaction:
        transaction.run("BEGIN")
        return [transaction.run(statement) for statement in statements]
