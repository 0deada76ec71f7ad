"""Delayed messages while there is no room: nothing is lost, and those that wait can always leave."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kiteq import delaying
from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.errors import StoreFull
from kiteq.message import Message
from kiteq.store.tables import Row, Table, Tables
from tests.e2e.test_delays import codes, rows_in, wait_delayed
from tests.e2e.wire import PATIENCE_SECONDS, JumpingClock, RawClient, Refused, connect, numbered, running


class FullTables:
    """A disk without room for messages of the log and rows of those that wait, until a test says so."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.full = True
        self.refused = 0

    def apply(self, rows: list[Row]) -> None:
        if self.full and any(table in (Table.LOG, Table.DELAYED) and value is not None for table, _, value in rows):
            self.refused += 1
            raise StoreFull("no room")
        self.tables.apply(rows)


async def test_messages_that_fill_the_store_leave_it_when_they_are_due(clock: JumpingClock) -> None:
    async with running("memory://", clock, store_limit=2_000_000) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"), window=10_000)
        stored = 0
        with pytest.raises(Refused) as refused:
            for number in range(100):
                await producer.publish(numbered(1, start=number, delay=60, properties={"filler": "x" * 50_000}))
                stored += 1
        assert (refused.value.code, refused.value.temporary) == ("store_full", True)
        assert len(rows_in(broker)) == stored > 5
        with pytest.raises(Refused, match="store_full"):
            await producer.publish(numbered(1, start=200, properties={"filler": "x" * 50_000}))
        clock.advance(61)
        taken = await consumer.take(stored)
        assert [one.number for one in taken] == list(range(stored))
        await consumer.ack(taken)
        with trio.fail_after(PATIENCE_SECONDS):
            while True:
                try:
                    await producer.publish(numbered(1, start=300, delay=1))
                    return
                except Refused:
                    await trio.sleep(0.1)


async def test_what_finds_no_room_is_moved_later_and_acks_go_on(
    server: Broker, producer: RawClient, clock: JumpingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delaying, "REFUSED_SECONDS", 0.02)
    consumer = await connect(server, "g", fanout("t"), window=10)
    await producer.publish([*numbered(2), *numbered(2, start=2, delay=60)])
    taken = await consumer.take(2)
    writer = server.core.store.writer
    full = FullTables(writer._tables)
    monkeypatch.setattr(writer, "_tables", full)
    clock.advance(61)
    with trio.fail_after(PATIENCE_SECONDS):
        while full.refused < 3:  # noqa: ASYNC110 of the timer
            await trio.sleep(0.01)
    assert await consumer.ack(taken) == []
    assert len(rows_in(server)) == 1
    assert (await consumer.row("g"))["pending"] == 0
    full.full = False
    assert [(one.number, one.attempt) for one in await consumer.take(2)] == [(2, 1), (3, 1)]
    await wait_delayed(producer, 0)
    await consumer.take_nothing(0.05)


async def test_a_cancellation_that_finds_no_room_is_refused_and_may_be_tried_again(
    server: Broker, producer: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = numbered(2, delay=60)
    await producer.publish([one, other])
    writer = server.core.store.writer
    full = FullTables(writer._tables)
    monkeypatch.setattr(writer, "_tables", full)
    with pytest.raises(Refused) as refused:
        await producer.admin("msg.cancel", id=one.id.hex())
    assert (refused.value.code, refused.value.temporary) == ("store_full", True)
    full.full = False
    assert await producer.admin("msg.cancel", id=one.id.hex()) == {"cancelled": 1}
    assert await producer.admin("msg.cancel", id=other.id.hex()) == {"cancelled": 1}
    assert rows_in(server) == []


async def test_a_groups_quota_refuses_new_delayed_messages_and_lets_due_ones_come(
    tmp_path: Path, clock: JumpingClock
) -> None:
    async with running(tmp_path / "db", clock, group_quota=100_000) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "slow", fanout("t"))
        await producer.publish([Message("t", "a", b"%010d" % 7, delay=60)])
        await producer.publish([Message("t", "a", b"x" * 30_000) for _ in range(4)])
        with trio.fail_after(PATIENCE_SECONDS):
            while codes(await producer.publish(numbered(1, delay=90))) != [(0, "group_quota")]:  # noqa: ASYNC110
                await trio.sleep(0.1)
        clock.advance(61)
        await consumer.wait_row("slow", pending=5)
        await consumer.credit(10)
        assert (await consumer.take(5))[-1].number == 7
