"""What goes out how fast, and to whom nothing goes: watermark, warm-up, fly messages, absent groups."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.remoting import packets
from tests.e2e.wire import JumpingClock, RawClient, connect, numbered, running


async def overload(broker: Broker, rate: int, seconds: float) -> None:
    """Publish three times what a watermark lets through; what goes out keeps to it, with no attempt used."""
    producer = await connect(broker, "p")
    consumer = await connect(broker, "g", fanout("t", watermark=rate), window=10_000)
    total = int(3 * rate * seconds)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def publish() -> None:
            for first in range(0, total, 30):
                await producer.publish(numbered(min(30, total - first), start=first))
                await trio.sleep_until(start + first / (3 * rate))

        nursery.start_soon(publish)
        got = []
        with trio.move_on_at(start + seconds):
            while True:
                got += await consumer.take(1)
                await consumer.send(packets.Ack(0, [got[-1].tag, got[-1].tag]))
        nursery.cancel_scope.cancel()
    assert 0.7 * rate * seconds <= len(got) <= 1.25 * rate * seconds + rate * 0.2
    assert [one.number for one in got] == list(range(len(got)))
    assert {one.attempt for one in got} == {1}
    await producer.ask(packets.Ping, packets.Pong)
    row = await consumer.row("g")
    assert row["retrying"] == row["dead"] == 0


@pytest.mark.slow
async def test_in_a_short_overload_a_watermark_holds_and_no_attempt_is_used(server: Broker) -> None:
    await overload(server, 500, 1.5)


@pytest.mark.long
async def test_after_ten_seconds_of_threefold_overload_every_message_still_has_attempt_one(server: Broker) -> None:
    await overload(server, 2_000, 10)
    row = await (await connect(server, "admin")).row("g")
    left = row["pending"]
    other = await connect(server, "g", window=10_000)
    assert {one.attempt for one in await other.take(min(left, 2_000))} == {1}


async def test_a_member_that_warms_up_gets_its_share_of_the_window(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock, ack_deadline=10_000) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"), window=100, warm_up=1000)
        await producer.publish(numbered(200))
        clock.advance(250)
        taken = await consumer.take(25)
        await consumer.take_nothing(0.12)
        clock.advance(250)
        taken += await consumer.take(25)
        await consumer.take_nothing(0.12)
        clock.advance(600)
        taken += await consumer.take(50)
        assert {one.attempt for one in taken} == {1}


async def test_a_fly_message_reaches_who_is_there_and_is_never_stored(folder: Path) -> None:
    async with running(folder) as broker:
        producer = await connect(broker, "p")
        nobody = await producer.publish([Message("t", "a", b"0000000000", fly=True)])
        assert (nobody.groups, nobody.durable) == (0, False)
        consumer = await connect(broker, "g", fanout("t"))
        dropped = await producer.publish(numbered(3, fly=True))
        assert (dropped.groups, dropped.durable) == (1, False)
        assert (await producer.admin("stat"))["counters"]["fly_dropped"] == 3
        await consumer.credit(10)
        await consumer.ask(packets.Ping, packets.Pong)
        await producer.publish(numbered(2, fly=True, start=5))
        taken = await consumer.take(2)
        assert [one.number for one in taken] == [5, 6]
        await consumer.nack(taken[:1])
        await consumer.break_off()
        again = await connect(broker, "g", window=10)
        await again.take_nothing()
        assert (await again.row("g"))["pending"] == 0
    async with running(folder) as broker:
        again = await connect(broker, "g", window=10)
        await again.take_nothing(0.05)


async def test_messages_wait_for_a_persistent_group_and_use_no_attempts(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock) as broker:
        await (await connect(broker, "g", fanout("t"))).break_off()
        producer = await connect(broker, "p")
        assert (await producer.publish(numbered(5))).groups == 1
        clock.advance(3600)
    async with running(folder, clock) as broker:
        consumer = await connect(broker, "g", window=10)
        assert [(one.number, one.attempt) for one in await consumer.take(5)] == [(n, 1) for n in range(5)]


async def test_a_non_persistent_group_is_matched_only_while_it_is_connected(
    server: Broker, producer: RawClient
) -> None:
    consumer = await connect(server, "g", fanout("t", persistent=False), window=10)
    assert (await producer.publish(numbered(1))).groups == 1
    await consumer.goodbye()
    await producer.ask(packets.Ping, packets.Pong)
    with trio.fail_after(5):
        while (await producer.publish(numbered(1, start=1))).groups:
            pass
    consumer = await connect(server, "g", window=10)
    assert (await producer.publish(numbered(1, start=2))).groups == 1


@pytest.mark.parametrize("restart", [False, True])
async def test_what_a_non_persistent_group_was_owed_waits_ten_seconds_and_is_dropped(
    folder: Path, clock: JumpingClock, restart: bool
) -> None:
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t", persistent=False))
        await producer.publish(numbered(4))
        await consumer.goodbye()
        clock.advance(8)
        consumer = await connect(broker, "g", window=2)
        taken = await consumer.take(2)
        assert [one.number for one in taken] == [0, 1]
        await consumer.nack(taken[:1], after_ms=60_000)
        await consumer.goodbye()
        if not restart:
            clock.advance(11)
            await producer.wait_row("g", pending=0, retrying=0, dropped=4)
    if restart:
        async with running(folder, clock) as broker:
            producer = await connect(broker, "p")
            assert (await producer.row("g"))["pending"] == 3
            clock.advance(11)
            await producer.wait_row("g", pending=0, retrying=0, dropped=4)
