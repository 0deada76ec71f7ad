"""The payment service: books the payment of each order exactly once, and tells that it did."""

from __future__ import annotations

import json
from typing import ClassVar

from examples.orders.database import Transaction
from examples.orders.service import Handler, Service
from examples.orders.steps import name_of
from kiteq_client import Message, Received


class PaymentService(Service):
    name = "payment-service"
    topic = "payments"
    table = """
        CREATE TABLE IF NOT EXISTS payments (
            message_id CHAR(32) PRIMARY KEY, order_id CHAR(32) NOT NULL, amount INTEGER NOT NULL
        )
    """
    accounts: ClassVar = {"till": 0}

    def consumes(self) -> dict[tuple[str, str], Handler]:
        return {("orders", "placed"): self.book}

    async def book(self, placed: Received) -> None:
        """Book the payment; "paid" is delivered if that is committed."""
        self.steps.reach("while-handling")
        key = placed.id.hex()  # stored with the payment, so a second delivery is recognised
        body = json.loads(placed.body)
        order, amount = body["order"], body["amount"]
        if await self.has_row("SELECT 1 FROM payments WHERE message_id = %s", key):
            self.steps.say(f"{name_of(order)} is booked already, this is a second delivery")
            return

        def write(database: Transaction) -> bool:
            # Two deliveries at once, to two of these services: the key lets one of them commit.
            database.run("INSERT INTO payments (message_id, order_id, amount) VALUES (%s, %s, %s)", key, order, amount)
            database.run("UPDATE accounts SET balance = balance + %s WHERE name = 'till'", amount)
            self.steps.say(f"payment of {amount} for {name_of(order)} written")
            return True

        await self.publish_with(Message("payments", "paid", json.dumps({"order": order})), write)
        self.steps.reach("before-ack")
