"""The order service: takes orders, takes their money from the customer's account, and closes them when paid."""

from __future__ import annotations

import json
from typing import ClassVar

from examples.orders.database import Transaction
from examples.orders.service import Handler, Service
from examples.orders.steps import name_of
from kiteq_client import Message, Outcome, Received


class OrderService(Service):
    name = "order-service"
    topic = "orders"
    table = """
        CREATE TABLE IF NOT EXISTS orders (
            id CHAR(32) PRIMARY KEY, customer VARCHAR(32) NOT NULL, amount INTEGER NOT NULL, state VARCHAR(8) NOT NULL
        )
    """
    accounts: ClassVar = {"anna": 300, "ben": 300, "clara": 300}

    def consumes(self) -> dict[tuple[str, str], Handler]:
        return {("shop", "wanted"): self.place, ("payments", "paid"): self.close}

    async def place(self, wanted: Received) -> None:
        """Write the order; "placed" is delivered if that is committed."""
        order = wanted.id.hex()  # the same, however often this message is delivered
        if await self.has_row("SELECT 1 FROM orders WHERE id = %s", order):
            self.steps.say(f"{name_of(order)} is placed already, this is a second delivery")
            return
        want = json.loads(wanted.body)

        def write(database: Transaction) -> bool:
            database.run(
                "INSERT INTO orders (id, customer, amount, state) VALUES (%s, %s, %s, 'placed')",
                order, want["customer"], want["amount"],
            )  # fmt: skip
            database.run("UPDATE accounts SET balance = balance - %s WHERE name = %s", want["amount"], want["customer"])
            [[balance]] = database.run("SELECT balance FROM accounts WHERE name = %s", want["customer"])
            self.steps.say(f"{name_of(order)} written: {want['amount']} of {want['customer']}, who has {balance} left")
            return bool(balance >= 0)

        placed = Message("orders", "placed", json.dumps({"order": order, "amount": want["amount"]}))
        if await self.publish_with(placed, write) is Outcome.ROLLED_BACK:
            self.steps.say(f"{name_of(order)} refused: {want['customer']} has not enough money")

    async def close(self, paid: Received) -> None:
        """Close the order; to do it twice changes nothing."""
        self.steps.reach("while-handling")
        order = json.loads(paid.body)["order"]
        await self.change("UPDATE orders SET state = 'paid' WHERE id = %s", order)
        self.steps.say(f"{name_of(order)} is paid and closed")
        self.steps.reach("before-ack")
