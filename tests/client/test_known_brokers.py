"""Brokers that serve different topics, come, go and change, with a registry that says so at once."""

from __future__ import annotations

import anyio

from kiteq.message import Message
from kiteq.registry.layout import Server
from kiteq_client.broker import Broker
from kiteq_client.outgoing import Frame
from tests.client.announcing import announce, finding_client
from tests.client.ledger import Ledger, everything, until
from tests.client.peer import both_loops, peer


def message(topic: str = "trade", body: bytes = b"x") -> Message:
    return Message(topic, "pay", body)


@both_loops
async def test_brokers_of_different_topics_do_not_wake_each_other_while_there_is_no_room() -> None:
    trade, feed = Ledger("b1"), Ledger("b2")
    trade.lose = feed.lose = everything
    asked = 0
    with finding_client() as client:
        async with peer(trade.script) as one, peer(feed.script) as two, client, anyio.create_task_group() as tasks:
            announce(client, (one, Server("b1", 1, 1), ("trade",)), (two, Server("b2", 1, 1), ("feed",)))
            await until(lambda: len(client.statistics().connected) == 2)
            take = client._brokers._take

            def counted(broker: Broker, body_bytes_max: int) -> Frame | None:
                nonlocal asked
                asked += 1
                return take(broker, body_bytes_max)

            for broker in client._brokers.all:
                broker._take = counted
            for topic in ("trade", "feed"):
                tasks.start_soon(client.send_many, [message(topic, bytes(200_000)) for _ in range(60)])
            await until(lambda: client.statistics().in_flight > 75)  # 16 MiB less a message
            await anyio.sleep(0.1)
            assert asked < 300  # one frame for each message, and some looks
            tasks.cancel_scope.cancel()
            trade.lose = feed.lose = lambda _packet: False
