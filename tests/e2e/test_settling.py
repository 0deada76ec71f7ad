"""What becomes of a message a consumer holds: acked, failed, handed back, late, rejected."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import direct, fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.pipe import deliveries
from kiteq.remoting import packets
from kiteq.store.tables import Row, Tables
from tests.e2e.wire import PATIENCE_SECONDS, JumpingClock, RawClient, connect, numbered, running


async def test_the_member_with_most_free_credit_gets_the_next_message(server: Broker, producer: RawClient) -> None:
    busy = await connect(server, "g", fanout("t"), window=100)
    await producer.publish(numbered(60))
    await busy.take(60)
    idle = await connect(server, "g", window=100)
    await idle.ask(packets.Ping, packets.Pong)
    await producer.publish(numbered(10, start=60))
    assert [one.number for one in await idle.take(10)] == list(range(60, 70))
    await busy.take_nothing(0.05)


async def test_a_goodbye_gives_messages_back_uncounted_and_in_order(server: Broker, producer: RawClient) -> None:
    first = await connect(server, "g", fanout("t"), window=10)
    for number in range(10):
        await producer.publish(numbered(1, start=number))
    taken = await first.take(10)
    await first.ack(taken[3:5])
    second = await connect(server, "g", window=100)
    await first.goodbye()
    again = await second.take(8)
    assert [(one.number, one.attempt) for one in again] == [(n, 1) for n in (0, 1, 2, 5, 6, 7, 8, 9)]


@pytest.mark.parametrize("separately", [False, True])
async def test_a_broken_connection_counts_only_what_was_being_handled(
    server: Broker, producer: RawClient, separately: bool
) -> None:
    first = await connect(server, "g", fanout("t"), window=10, concurrency=3)
    for number in range(0, 8, 1 if separately else 8):
        await producer.publish(numbered(1 if separately else 8, start=number))
    await first.take(8)
    await first.break_off()
    second = await connect(server, "g", window=100)
    again = await second.take(8)
    assert [(one.number, one.attempt) for one in again] == [(n, 2 if n < 3 else 1) for n in range(8)]


async def test_without_an_ack_a_message_comes_again_and_its_old_tag_has_no_effect(
    folder: Path, clock: JumpingClock
) -> None:
    async with running(folder, clock, ack_deadline=30) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"), window=10)
        for number in range(3):
            await producer.publish(numbered(1, start=number))
        late = await consumer.take(3)
        clock.advance(31)
        again = await consumer.take(3)
        assert [(one.number, one.attempt) for one in again] == [(0, 2), (1, 2), (2, 2)]
        assert await consumer.ack(late) == [late[0].tag, late[-1].tag]
        assert await consumer.nack(late) == [tag for one in reversed(late) for tag in (one.tag, one.tag)]
        assert (await consumer.row("g"))["pending"] == 3
        assert await consumer.ack(again) == []
        assert (await consumer.row("g"))["pending"] == 0


async def test_an_extended_message_is_kept_until_the_longest_hold(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock, ack_deadline=30, max_hold=100) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"), window=10)
        await producer.publish(numbered(2))
        held = await consumer.take(2)
        for _ in range(4):
            clock.advance(24)
            await consumer.send(packets.Extend(0, [held[0].tag, held[1].tag]))
            await consumer.take_nothing(0.15)
        clock.advance(6)
        await consumer.send(packets.Extend(0, [held[0].tag, held[1].tag]))
        again = await consumer.take(2)
        assert [(one.number, one.attempt) for one in again] == [(0, 2), (1, 2)]


async def test_attempts_are_counted_for_each_group_apart(server: Broker, producer: RawClient) -> None:
    good = await connect(server, "good", fanout("t"), window=10)
    bad = await connect(server, "bad", fanout("t"), window=10)
    await producer.publish(numbered(2))
    await good.ack(await good.take(2))
    for attempt in (1, 2, 3):
        taken = await bad.take(2)
        assert [(one.number, one.attempt) for one in taken] == [(0, attempt), (1, attempt)]
        await bad.nack(taken)
    await good.take_nothing()
    assert (await good.row("good"))["retrying"] == 0
    assert (await good.row("bad"))["retrying"] == 2


async def test_two_failures_cost_no_wait_and_the_third_five_seconds(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    await producer.publish(numbered(1))
    for attempt in (1, 2, 3):
        (taken,) = await consumer.take(1)
        assert taken.attempt == attempt
        await consumer.nack([taken])
    clock.advance(4.5)
    await consumer.take_nothing()
    clock.advance(1.1)
    (taken,) = await consumer.take(1)
    assert taken.attempt == 4
    await consumer.ack([taken])
    assert (await consumer.row("g"))["retrying"] == 0


async def test_a_failed_message_waits_as_long_as_its_consumer_asked(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=1)
    await producer.publish(numbered(2))
    await consumer.nack(await consumer.take(1), "later", after_ms=60_000)
    (other,) = await consumer.take(1)
    assert (other.number, other.attempt) == (1, 1)  # a message that waits holds nothing back
    await consumer.ack([other])
    clock.advance(59)
    await consumer.take_nothing()
    clock.advance(1.1)
    (again,) = await consumer.take(1)
    assert (again.number, again.attempt) == (0, 2)


class HeldTables:
    """A disk whose next commits end only when a test says so."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.released = threading.Event()

    def apply(self, rows: list[Row]) -> None:
        self.released.wait(PATIENCE_SECONDS)
        self.tables.apply(rows)


async def test_a_retry_that_is_due_before_it_is_durable_still_comes(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=1)
    await producer.publish(numbered(1))
    (taken,) = await consumer.take(1)
    (outlet,) = server.core.router.outlets()
    writer = server.core.store.writer
    held = HeldTables(writer._tables)
    writer._tables = held  # type: ignore[assignment]
    try:
        await consumer.send(packets.Nack(9, [[taken.tag, packets.NACK_FAILED, 1, "broken"]]))
        with trio.fail_after(PATIENCE_SECONDS):
            while outlet.leased or outlet.due:  # noqa: ASYNC110 until the timer has taken it up
                await trio.sleep(0.01)
        await trio.sleep(0.1)
    finally:
        held.released.set()
    (again,) = await consumer.take(1)
    assert again.attempt == 2


async def test_retries_survive_a_restart_with_their_count_and_wait(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"), window=10)
        await producer.publish(numbered(1))
        for attempt in (1, 2, 3):
            (taken,) = await consumer.take(1)
            assert taken.attempt == attempt
            await consumer.nack([taken], f"failure {attempt}")
    async with running(folder, clock) as broker:
        consumer = await connect(broker, "g", window=10)
        assert (await consumer.row("g"))["retrying"] == 1
        await consumer.take_nothing()
        clock.advance(6)
        (taken,) = await consumer.take(1)
        assert (taken.number, taken.attempt) == (0, 4)
        await consumer.reject([taken], "enough")
        (letter,) = await consumer.admin("dlq.list", group="g")
        shown = await consumer.admin("dlq.show", group="g", id=letter["id"])
        assert [entry["error"] for entry in shown["history"]] == ["failure 1", "failure 2", "failure 3", "enough"]


async def test_messages_settled_in_part_survive_a_restart_as_what_is_missing(folder: Path) -> None:
    async with running(folder) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"), window=100)
        await connect(broker, "other", direct("t", "a"))
        await producer.publish(numbered(30))
        taken = await consumer.take(30)
        await consumer.ack([one for one in taken if one.number % 3])
    for _ in range(2):
        async with running(folder) as broker:
            consumer = await connect(broker, "g", window=100)
            again = await consumer.take(10)
            assert [(one.number, one.attempt) for one in again] == [(n, 1) for n in range(0, 30, 3)]
            await consumer.take_nothing(0.05)
            assert (await consumer.row("other"))["pending"] == 30


async def test_no_deliver_frame_is_larger_than_the_welcome_says(server: Broker, producer: RawClient) -> None:
    body = bytes(300_000)
    for _ in range(4):
        await producer.publish([Message("t", "warm", body) for _ in range(3)])
    consumer = await connect(server, "g", fanout("t"))
    for _ in range(4):
        await producer.publish([Message("t", "a", body) for _ in range(5)])
        await producer.publish([Message("t", "a", body, fly=True) for _ in range(5)])
    consumer.decoder.frame_bytes_max = 2 << 20
    await consumer.credit(1000)
    await producer.publish([Message("t", "a", body, fly=True) for _ in range(5)])
    await producer.publish([Message("t", "a", body, fly=True) for _ in range(5)])
    await consumer.take(20)


async def test_fly_messages_that_waited_for_credit_fit_frames_too(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=1)
    consumer.decoder.frame_bytes_max = 2 << 20
    await producer.publish(numbered(1))
    await consumer.take(1)
    for _ in range(5):
        await producer.publish([Message("t", "a", bytes(300_000), fly=True) for _ in range(3)])
    await consumer.credit(1000)
    await consumer.take(15)


async def test_retries_larger_than_one_read_of_them_all_come_again(
    server: Broker, producer: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "RETRIES_LOADED_BYTES", 200)
    consumer = await connect(server, "g", fanout("t"), window=20)
    await producer.publish(numbered(20))
    await consumer.nack(await consumer.take(20), after_ms=20)
    again = await consumer.take(20)
    assert sorted((one.number, one.attempt) for one in again) == [(number, 2) for number in range(20)]
    assert await consumer.ack(again) == []
    await producer.wait_row("g", pending=0, retrying=0)
