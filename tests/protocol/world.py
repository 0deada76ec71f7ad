"""A part of a broker that one test has for itself: a group, a topic, and connections that are closed at its end."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from tests.protocol.raw_client import Message
from tests.protocol.raw_transactions import TransactionClient
from tests.support.broker import BrokerProcess


class World(ExitStack):
    """Names nobody else uses, and clients of `broker`."""

    def __init__(self, broker: BrokerProcess) -> None:
        super().__init__()
        self.broker = broker
        word = os.urandom(6).hex()
        self.group, self.topic, self.other_topic = f"shop-{word}", f"order-{word}", f"bill-{word}"
        self.consumers = f"stock-{word}"

    def producer(self, *topics: str, group: str | None = None, instance: bytes | None = None) -> TransactionClient:
        """Connect a publisher of `topics`; of both topics when none is given."""
        client = self._connect(instance)
        client.join(group or self.group, *(topics or (self.topic, self.other_topic)))
        return client

    def consumer(self, group: str | None = None) -> TransactionClient:
        """Connect a member of a group bound to both topics."""
        client = self._connect()
        client.join(group or self.consumers, bound=(self.topic, self.other_topic))
        return client

    def message(self, body: bytes = b"order", topic: str | None = None, **fields: Any) -> bytes:
        """Return an encoded message; its topic is the first one if not given."""
        return Message(topic or self.topic, "paid", body, **fields).encode()

    def _connect(self, instance: bytes | None = None) -> TransactionClient:
        client = TransactionClient(self.broker.host, self.broker.port, instance)
        self.enter_context(client)
        return client
