"""The log under delivery: deep backlogs, trimming by record, rewriting, damage, and users' handlers."""

from __future__ import annotations

from pathlib import Path

import lmdb
import pytest
import trio
from trio.testing import MockClock

from kiteq.binding.bindings import direct, fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.remoting import packets
from kiteq.store.tables import Table
from tests.e2e.wire import PATIENCE_SECONDS, JumpingClock, RawClient, connect, numbered, running


@pytest.fixture
def hurried() -> MockClock:
    return MockClock(rate=1)


def log_bytes(broker: Broker) -> list[int]:
    return [len(value) for _, value in broker.core.store.tables.scan(Table.LOG, b"", b"\xff" * 16)]


@pytest.mark.slow
@pytest.mark.parametrize("restart", [False, True])
async def test_a_backlog_over_the_memory_bound_is_read_once_and_in_order(folder: Path, restart: bool) -> None:
    total = 50_000
    padding = bytes(250)

    async def fill(broker: Broker) -> None:
        await connect(broker, "g", fanout("t"))
        producer = await connect(broker, "p")
        for first in range(0, total, 500):
            await producer.publish([Message("t", "a", b"%010d" % n + padding) for n in range(first, first + 500)])

    async def drain(broker: Broker) -> None:
        consumer = await connect(broker, "g", window=2_000)
        expected = 0
        with trio.fail_after(30):
            while expected < total:
                await consumer.read()
                taken, consumer.deliveries = consumer.deliveries, []
                for one in taken:
                    assert (one.number, one.attempt) == (expected, 1)
                    expected += 1
                if taken:
                    await consumer.send(packets.Ack(0, [taken[0].tag, taken[-1].tag]))
        await consumer.wait_row("g", pending=0)
        await consumer.ask(packets.Ack, packets.Settled, [1, 1])  # answered once all before is durable
        assert log_bytes(broker) == []

    async with running(folder) as broker:
        await fill(broker)
        if not restart:
            await drain(broker)
    if restart:
        async with running(folder) as broker:
            await drain(broker)


async def test_an_absent_group_keeps_its_own_messages_not_the_topics(
    folder: Path, clock: JumpingClock, hurried: MockClock
) -> None:
    async with running(folder, clock, ack_deadline=10_000) as broker:
        producer = await connect(broker, "p")
        await connect(broker, "absent", direct("t", "rare"))
        consumer = await connect(broker, "g", fanout("t"), window=10_000)
        for number in range(10):
            many = [Message("t", "a", b"%010d" % (1000 * number + n) + bytes(500)) for n in range(100)]
            await producer.publish([*many, *([Message("t", "rare", b"%010d" % number)] if number % 2 else [])])
        taken = await consumer.take(1005)
        await consumer.ack(taken[:-1])
        assert sum(log_bytes(broker)) < 350_000  # whole records have gone
        clock.advance(61)
        hurried.jump(31)
        with trio.fail_after(PATIENCE_SECONDS):
            while sum(log_bytes(broker)) > 10_000:  # noqa: ASYNC110 a timer of the broker does it
                await trio.sleep(0.02)
    async with running(folder) as broker:
        absent = await connect(broker, "absent", window=100)
        taken = await absent.take(5)
        assert [(one.number, one.attempt) for one in taken] == [(n, 1) for n in (1, 3, 5, 7, 9)]
        await absent.ack(taken)
        last = await connect(broker, "g", window=10)
        assert [one.number for one in await last.take(1)] == [9]


async def test_a_damaged_message_in_the_file_is_delivered_to_nobody_and_its_neighbours_are(folder: Path) -> None:
    async with running(folder) as broker:
        await connect(broker, "g", fanout("t"))
        await (await connect(broker, "p")).publish(numbered(5))
    with lmdb.open(str(folder), max_dbs=16, map_size=1 << 30) as environment:
        table = environment.open_db(b"log")
        with environment.begin(write=True) as transaction:
            ((key, value),) = list(transaction.cursor(table))
            spot = value.index(b"0000000002")
            transaction.put(key, value[:spot] + b"x" + value[spot + 1 :], db=table)
    async with running(folder) as broker:
        consumer = await connect(broker, "g", window=10)
        taken = await consumer.take(4)
        assert [one.number for one in taken] == [0, 1, 3, 4]
        await consumer.ack(taken)
        row = await consumer.wait_row("g", pending=0)
        assert row["damaged"] == 1
        assert log_bytes(broker) == []


async def test_a_slow_group_does_not_disturb_another(server: Broker, producer: RawClient) -> None:
    await connect(server, "slow", fanout("t"), window=1)
    quick = await connect(server, "quick", fanout("t"), window=100)
    for number in range(20):
        await producer.publish(numbered(50, start=50 * number))
        taken = await quick.take(50)
        assert [one.number for one in taken] == list(range(50 * number, 50 * number + 50))
        await quick.ack(taken)
    assert (await quick.row("slow"))["pending"] == 1000


async def test_a_users_handler_drops_one_message_type(folder: Path) -> None:
    async with running(folder, handlers=("examples.drop_type:DropType",)) as broker:
        consumer = await connect(broker, "g", fanout("t"), window=10)
        receipts = await consumer.publish([*numbered(1), *numbered(2, message_type="debug"), *numbered(1, start=3)])
        assert (receipts.groups, receipts.exceptions) == ([1, 0, 0, 1], [])
        assert [one.number for one in await consumer.take(2)] == [0, 3]
        await consumer.take_nothing(0.05)


async def test_a_large_record_before_a_gap_does_not_hold_up_what_lies_behind_it(
    server: Broker, producer: RawClient
) -> None:
    for group in ("g", "absent"):
        await (await connect(server, group, direct("t", "a"))).goodbye()
    await producer.publish([Message("t", "a", bytes(600_000))])  # more than one read of the log, and kept for `absent`
    await producer.publish([Message("t", "unbound", b"a gap in the sequences of the log")])
    await producer.publish(numbered(1, start=2))
    consumer = await connect(server, "g", window=10)
    await consumer.ack(await consumer.take(1))
    assert [one.number for one in await consumer.take(1)] == [2]
