"""Delayed messages over real sockets: never early, each once, whatever happens meanwhile."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from zlib import crc32

import msgpack
import pytest
import trio

from kiteq.binding.bindings import direct, fanout
from kiteq.broker import Broker
from kiteq.limits import DELAY_MS_MAX, TTL_MS_MAX
from kiteq.message import FLAG_FLY, Message
from kiteq.remoting import packets
from kiteq.store.delayed import KEYS_END
from kiteq.store.tables import Table
from tests.e2e.wire import PATIENCE_SECONDS, JumpingClock, RawClient, connect, numbered, running
from tests.support.broker import BrokerProcess

DAY_SECONDS = 86_400


def codes(receipts: packets.Receipts) -> list[tuple[int, str]]:
    return [(index, code) for index, code, *_ in receipts.exceptions]


def rows_in(broker: Broker, table: Table = Table.DELAYED) -> list[tuple[bytes, bytes]]:
    return broker.core.store.tables.scan(table, b"", KEYS_END)


def crafted(extras: list[object], flags: int = 0) -> bytes:
    """Return a message as a client of another maker may send it, unchecked."""
    head = msgpack.packb(["t", "a", TTL_MS_MAX, 100, flags])
    packed = msgpack.packb(extras)
    body = b"%010d" % 0
    content = b"".join(
        (bytes(15), b"c", struct.pack(">IQH", crc32(body), 1, len(head)), head, struct.pack(">H", len(packed)), packed)
    )
    return content + body + struct.pack("<I", crc32(content + body))


async def wait_delayed(client: RawClient, messages: int) -> dict[str, int]:
    """Wait until so many messages are said to wait for their time; return what is told of them."""
    with trio.fail_after(PATIENCE_SECONDS):
        while (told := (await client.admin("stat"))["delayed"])["messages"] != messages:  # noqa: ASYNC110 nothing tells of it
            await trio.sleep(0.01)
    return told  # type: ignore[no-any-return]


async def test_a_delayed_message_comes_when_it_is_due_and_not_before(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=100)
    receipts = await producer.publish(numbered(3, delay=60))
    assert codes(receipts) == [(0, "delayed"), (1, "delayed"), (2, "delayed")]
    assert receipts.durable
    clock.advance(59)
    await consumer.take_nothing()
    clock.advance(1.1)
    assert [(one.number, one.attempt) for one in await consumer.take(3)] == [(0, 1), (1, 1), (2, 1)]
    await wait_delayed(producer, 0)
    assert rows_in(server) == []


async def test_nothing_is_early_not_by_a_millisecond(server: Broker, producer: RawClient, clock: JumpingClock) -> None:
    consumer = await connect(server, "g", fanout("t"), window=1_000)
    for wait_ms in range(1, 31):
        sent_s = clock.monotonic()
        await producer.publish([Message("t", "a", b"%.9f" % (sent_s + wait_ms / 1000), delay=wait_ms / 1000)])
    for _ in range(30):
        (one,) = await consumer.take(1)
        assert clock.monotonic() >= float(one.body)
    for wait_ms in range(1, 11):
        at_s = clock.epoch_ms() / 1000 + wait_ms / 1000
        await producer.publish([Message("t", "a", b"%.4f" % at_s, deliver_at=at_s)])
    for _ in range(10):
        (one,) = await consumer.take(1)
        assert clock.epoch_ms() >= float(one.body) * 1000


async def test_a_message_without_a_wait_is_an_ordinary_one(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=100)
    receipts = await producer.publish([*numbered(1, delay=0), *numbered(1, start=1, deliver_at=1_000.5)])
    assert (receipts.groups, codes(receipts)) == (1, [])
    assert [one.number for one in await consumer.take(2)] == [0, 1]


async def test_a_frame_of_both_kinds_tells_which_is_which(server: Broker, producer: RawClient) -> None:
    await connect(server, "g", fanout("t"))
    messages = [*numbered(2), *numbered(1, start=2, delay=9), *numbered(1, start=3)]
    receipts = await producer.publish([*messages, b"no message"])
    assert (receipts.groups, codes(receipts)) == ([1, 1, 0, 1, 0], [(2, "delayed"), (4, "bad_checksum")])


async def test_they_come_in_the_order_of_their_time(server: Broker, producer: RawClient, clock: JumpingClock) -> None:
    consumer = await connect(server, "g", fanout("t"), window=100)
    for number, seconds in enumerate((50, 10, 40, 20, 30, 10)):
        await producer.publish(numbered(1, start=number, delay=seconds))
    clock.advance(60)
    assert [one.number for one in await consumer.take(6)] == [1, 5, 3, 4, 2, 0]


async def test_a_nearer_one_wakes_the_timer_that_waits_for_a_later_one(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=100)
    await producer.publish(numbered(1, delay=DAY_SECONDS))
    await producer.publish(numbered(1, start=1, delay=0.05))
    assert [one.number for one in await consumer.take(1)] == [1]
    assert (await wait_delayed(producer, 1))["next_due_ms"] > 0


async def test_the_groups_are_those_bound_when_it_is_due(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    gone = await connect(server, "gone", fanout("t"), window=10)
    await producer.publish(numbered(1, delay=60))
    await producer.admin("group.drop", group="gone")
    late = await connect(server, "late", fanout("t"), window=10)
    clock.advance(61)
    assert [one.number for one in await late.take(1)] == [0]
    await gone.take_nothing(0.05)


async def test_the_time_to_live_counts_from_when_it_is_due(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    consumer = await connect(server, "g", fanout("t"))
    await producer.publish(numbered(2, delay=2 * DAY_SECONDS, ttl=30))
    clock.advance(2 * DAY_SECONDS + 1)
    await producer.wait_row("g", pending=2)
    clock.advance(28)
    await consumer.credit(1)
    first = await consumer.take(1)
    clock.advance(3)
    await consumer.ack(first)
    await consumer.wait_row("g", pending=0, dead=1)


async def test_a_message_that_nobody_is_bound_to_when_it_is_due_is_kept(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    await producer.publish(numbered(1, delay=60))
    clock.advance(61)
    await wait_delayed(producer, 0)
    first = await connect(server, "first", fanout("t", start="first"), window=10)
    assert [one.number for one in await first.take(1)] == [0]


async def test_a_repeat_is_a_duplicate_also_after_a_restart(folder: Path, clock: JumpingClock) -> None:
    messages = numbered(2, delay=60)
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        await producer.publish(numbered(1, start=5))
        await producer.publish(messages)
        assert codes(await producer.publish(messages)) == [(0, "duplicate"), (1, "duplicate")]
        assert len(rows_in(broker)) == 1
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        assert codes(await producer.publish(messages)) == [(0, "duplicate"), (1, "duplicate")]
        consumer = await connect(broker, "g", fanout("t"), window=10)
        clock.advance(61)
        assert [one.number for one in await consumer.take(2)] == [0, 1]
        await consumer.take_nothing(0.05)


async def test_what_a_restart_falls_into_is_delivered_once_and_in_time(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        await connect(broker, "g", fanout("t"))
        for number, seconds in enumerate((10, 60, DAY_SECONDS)):
            await producer.publish(numbered(1, start=number, delay=seconds))
    clock.advance(30)
    async with running(folder, clock) as broker:
        consumer = await connect(broker, "g", window=100)
        assert [one.number for one in await consumer.take(1)] == [0]
        assert (await wait_delayed(consumer, 2))["bytes"] == sum(len(value) for _, value in rows_in(broker))
        await consumer.take_nothing(0.05)
        clock.advance(31)
        assert [one.number for one in await consumer.take(1)] == [1]
        told = await wait_delayed(consumer, 1)
        assert told["bytes"] == sum(len(value) for _, value in rows_in(broker))
        clock.advance(DAY_SECONDS)
        await consumer.ack(await consumer.take(1))
        assert await wait_delayed(consumer, 0) == {"messages": 0, "bytes": 0, "next_due_ms": None}


@pytest.mark.slow
@pytest.mark.usefixtures("folder")  # it removes the store
async def test_after_kill_9_what_was_due_meanwhile_comes_once_and_what_was_cancelled_never(tmp_path: Path) -> None:
    messages = numbered(60, delay=0.8)

    async def greeted(process: BrokerProcess, group: str) -> RawClient:
        client = RawClient(await trio.open_tcp_stream(process.host, process.port))
        await client.hello(group, [fanout("t")] if group == "g" else [])
        return client

    async with BrokerProcess(tmp_path) as process:
        producer, consumer = await greeted(process, "p"), await greeted(process, "g")
        for at in range(0, 60, 20):
            assert len(codes(await producer.publish(messages[at : at + 20]))) == 20
        for at in (3, 25, 59):
            assert await producer.admin("msg.cancel", id=messages[at].id.hex()) == {"cancelled": 1}
        process.kill()
        await producer.stream.aclose()
        await consumer.stream.aclose()
        await trio.sleep(1)
        await trio.to_thread.run_sync(process.start)
        consumer = await greeted(process, "g")
        await consumer.credit(100)
        assert [one.number for one in await consumer.take(57)] == [n for n in range(60) if n not in (3, 25, 59)]
        await consumer.take_nothing()
        await consumer.goodbye()


@pytest.mark.parametrize(
    ("blob", "code"),
    [
        (crafted([{}, None, 5], FLAG_FLY), "fly_not_allowed"),
        (crafted([{}, None, None, time.time_ns() // 1_000_000 + DAY_SECONDS * 1000], FLAG_FLY), "fly_not_allowed"),
        (crafted([{}, None, DELAY_MS_MAX + 1]), "bad_limit"),
        (crafted([{}, None, None, 1 << 60]), "bad_limit"),
        (crafted([{}, None, None, -1]), "bad_limit"),
        (crafted([{}, None, 5, 5]), "bad_limit"),
    ],
    ids=["fly", "fly later", "too long", "too late", "before 1970", "both"],
)
async def test_a_wait_that_cannot_be_is_refused(producer: RawClient, blob: bytes, code: str) -> None:
    assert codes(await producer.publish([blob])) == [(0, code)]


async def test_a_fly_message_without_a_wait_may_say_so(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    receipts = await producer.publish([crafted([{}, None, 0], FLAG_FLY)])
    assert (receipts.groups, codes(receipts)) == (1, [])
    assert [one.number for one in await consumer.take(1)] == [0]


async def test_a_delayed_message_to_a_topic_that_is_not_served_is_refused_and_a_stored_one_still_comes(
    folder: Path, clock: JumpingClock
) -> None:
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        await connect(broker, "g", fanout("t"))
        await producer.publish(numbered(2, delay=60))
    async with running(folder, clock, topics=("u",)) as broker:
        producer = await connect(broker, "p")
        assert codes(await producer.publish(numbered(1, start=7, delay=1))) == [(0, "topic_not_served")]
        consumer = await connect(broker, "g", window=10)
        clock.advance(61)
        assert [one.number for one in await consumer.take(2)] == [0, 1]


async def test_an_asynchronous_flush_says_so_of_delayed_messages_too(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock, flush="async") as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", direct("t", "a"), window=10)
        receipts = await producer.publish(numbered(2, delay=60))
        assert (receipts.durable, codes(receipts)) == (False, [(0, "delayed"), (1, "delayed")])
        clock.advance(61)
        assert [one.number for one in await consumer.take(2)] == [0, 1]


async def test_many_that_are_due_at_one_moment_come_in_order(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10_000)
    count = 5_000
    due_s = server.core.clock.epoch_ms() / 1000 + 60
    messages = numbered(count, deliver_at=due_s, properties={"filler": "x" * 200})
    for at in range(0, count, 250):
        await producer.publish(messages[at : at + 250])
    clock.advance(60)
    received: list[int] = []
    while len(received) < count:
        taken = await consumer.take(1)
        taken += await consumer.take(len(consumer.deliveries))
        received += [one.number for one in taken]
        await consumer.ack(taken)
    assert received == list(range(count))
    await wait_delayed(producer, 0)


async def test_a_damaged_row_goes_to_quarantine_and_its_neighbours_come(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        await connect(broker, "g", fanout("t"))
        for start in (0, 3, 6):
            await producer.publish(numbered(3, start=start, delay=10 + start))
        (_, first), (damaged_key, second), _ = rows_in(broker)
        assert len(first) == len(second)
        tables = broker.core.store.tables
        keys = [key for key, _ in rows_in(broker)]
        tables.apply([(Table.DELAYED, keys[0], first[:-20] + b"?" + first[-19:])])  # of the last message's body
        tables.apply([(Table.DELAYED, damaged_key, b"\x01q" + second)])
    async with running(folder, clock) as broker:
        consumer = await connect(broker, "g", window=10)
        clock.advance(20)
        assert [one.number for one in await consumer.take(5)] == [0, 1, 6, 7, 8]
        assert [key for key, _ in rows_in(broker, Table.QUARANTINE)] == keys[:2]
        assert (await consumer.admin("stat"))["damaged_records"] == 2
        assert rows_in(broker) == []
