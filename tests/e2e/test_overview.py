"""What a broker tells of everything it does, in one answer."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.limits import FRAME_OVERHEAD_BYTES, NAME_LENGTH_MAX
from kiteq.pipe import overview
from kiteq.remoting import packets
from tests.e2e.wire import JumpingClock, RawClient, connect, numbered, running


async def ask(client: RawClient, verb: str = "overview") -> Any:
    return (await client.ask(packets.Admin, packets.AdminReply, verb, {})).result


async def only_topic(client: RawClient) -> dict[str, Any]:
    row: dict[str, Any]
    (row,) = (await ask(client))["topic_rows"]
    return row


async def test_counts_go_on_with_messages_and_acks(server: Broker, producer: RawClient, clock: JumpingClock) -> None:
    consumer = await connect(server, "g", fanout("t"))
    await producer.publish(numbered(5))
    await consumer.credit(2)
    first, second = await consumer.take(2)
    told = await ask(producer)
    (topic,), (group,) = told["topic_rows"], told["group_rows"]
    assert (topic["topic"], topic["in"], topic["out"], topic["groups"], topic["pending"]) == ("t", 5, 0, 1, 5)
    assert (group["group"], group["connections"], group["in_flight"], group["pending"]) == ("g", 1, 2, 5)
    assert topic["pending_bytes"] == group["pending_bytes"] > 0
    assert (told["accepted"], told["acked"], told["pending"], told["dead"]) == (5, 0, 5, 0)
    await consumer.ask(packets.Ack, packets.Settled, [first.tag, first.tag])
    await consumer.ask(packets.Nack, packets.Settled, [[second.tag, packets.NACK_REJECTED, 0, "never"]])
    later = await ask(producer)
    (topic,), (group,) = later["topic_rows"], later["group_rows"]
    assert (topic["out"], topic["pending"], topic["dead"]) == (1, 3, 1)
    assert (group["out"], group["dead"], later["dead"], later["acked"]) == (1, 1, 1, 1)
    assert later["at_s"] > told["at_s"]
    assert (later["epoch"], later["state"], later["registry"]) == (1, "ok", None)


async def test_the_oldest_message_is_the_oldest_that_somebody_is_owed(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    assert (await ask(producer))["topic_rows"] == []
    consumer = await connect(server, "g", fanout("t"))
    await producer.publish(numbered(1))
    clock.advance(5)
    await producer.publish(numbered(1))
    clock.advance(2)
    assert (await only_topic(producer))["oldest_age_s"] == 7
    await consumer.credit(1)
    (first,) = await consumer.take(1)
    clock.advance(1)
    assert (await only_topic(producer))["oldest_age_s"] == 8
    await consumer.ask(packets.Ack, packets.Settled, [first.tag, first.tag])
    assert (await only_topic(producer))["oldest_age_s"] == 3
    (second,) = await consumer.take(1)
    await consumer.ask(packets.Ack, packets.Settled, [second.tag, second.tag])
    assert (await only_topic(producer))["oldest_age_s"] is None


async def test_of_many_topics_those_with_most_waiting_are_told_of(
    server: Broker, producer: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "ROWS_MAX", 2)
    for name, count in (("few", 1), ("many", 3), ("some", 2)):
        await connect(server, name, fanout(name))
        await producer.publish(numbered(count, name))
    told = await ask(producer)
    assert [row["topic"] for row in told["topic_rows"]] == ["many", "some"]
    assert [row["group"] for row in told["group_rows"]] == ["many", "some"]
    assert (told["topic_count"], told["group_count"], told["pending"]) == (3, 3, 6)


@pytest.mark.slow
async def test_the_largest_answer_fits_the_smallest_frame() -> None:
    async with running("memory://", message_limit=1) as broker:
        for number in range(overview.ROWS_MAX):
            name = f"{number:04}".ljust(NAME_LENGTH_MAX, "x")
            client = await connect(broker, name, fanout(name))
            await client.stream.aclose()
        told = await ask(await connect(broker, "kiteq-cli"))
        assert len(told["topic_rows"]) == len(told["group_rows"]) == overview.ROWS_MAX
        # Counts that are large take up to eight bytes more each, of which there are seventeen.
        assert len(msgpack.packb(told)) + overview.ROWS_MAX * 17 * 8 < FRAME_OVERHEAD_BYTES


async def test_a_drain_that_is_asked_for_is_answered_before_it_begins(server: Broker, producer: RawClient) -> None:
    shown = await ask(producer, "broker.show")
    assert (shown["state"], shown["topics"], shown["wire_version"]) == ("ok", [], packets.WIRE_VERSION)
    told = await ask(producer, "broker.drain")
    assert (told["draining_before"], told["broker_id"]) == (False, shown["broker_id"])
    await producer.wait(packets.Goodbye)
    with trio.fail_after(10):
        assert await producer.closed() is None
