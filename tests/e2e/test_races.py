"""Requests that overtake each other, and sizes at their bounds."""

from __future__ import annotations

import pytest

from kiteq.binding.bindings import direct
from kiteq.broker import Broker
from kiteq.limits import TOPICS_MAX
from kiteq.message import Message
from kiteq.remoting import packets
from tests.e2e.wire import RawClient, Refused, connect, numbered, running


async def test_a_binding_removed_while_another_is_written_leaves_the_backlog(
    server: Broker, producer: RawClient
) -> None:
    client = await connect(server, "g", direct("t", "a"))
    await producer.publish(numbered(5))
    await client.send(
        packets.Subscribe(101, [["t", 0, "b", None, True, "latest"]]), packets.Unsubscribe(102, "t", 0, "a")
    )
    await client.wait(packets.Subscribed, 101)
    await client.wait(packets.Subscribed, 102)
    assert (await producer.publish(numbered(1, message_type="b"))).groups == 1
    assert (await producer.publish(numbered(1, start=7))).groups == 0
    assert (await producer.row("g"))["pending"] == 6


async def test_one_request_cannot_make_more_topics_than_allowed(server: Broker) -> None:
    client = await connect(server, "g")
    wire = [[f"topic-{number}", 2, "*", None, True, "latest"] for number in range(TOPICS_MAX + 1)]
    with pytest.raises(Refused) as refused:
        await client.ask(packets.Subscribe, packets.Subscribed, wire)
    assert refused.value.code == "too_many_topics"
    assert await client.admin("group.list") == []


async def test_a_group_that_binds_between_two_drops_is_bound(server: Broker, producer: RawClient) -> None:
    client = await connect(server, "g", direct("t", "a"))
    old = server.core.deliveries.groups["g"].outlets["t"]
    await producer.admin("group.drop", group="g")
    await client.ask(packets.Subscribe, packets.Subscribed, [["t", 0, "a", None, True, "latest"]])
    server.core.router.close(old)  # as the second of two drops that listed the group's topics at once
    await producer.publish(numbered(1))
    await client.credit(10)
    assert [one.number for one in await client.take(1)] == [0]


async def test_a_message_larger_than_an_outbox_is_delivered() -> None:
    async with running("memory://", message_limit=32 << 20) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", direct("t", "a"), window=10)
        await producer.publish([Message("t", "a", b"x" * (24 << 20))])
        (delivery,) = await consumer.take(1)
        assert len(delivery.body) == 24 << 20
