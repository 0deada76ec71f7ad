"""What is kept because no group was bound: how much of it, and the groups that take it over, when that is not easy."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import kiteq.recovery
import kiteq.remoting.session
from kiteq.binding.bindings import direct, fanout, to_wire
from kiteq.broker import Broker
from kiteq.errors import StoreFull
from kiteq.message import Message
from kiteq.remoting import packets
from kiteq.store.tables import Row, Table
from tests.e2e.wire import JumpingClock, RawClient, Refused, connect, numbered, open_raw, running

MESSAGE_BYTES = 100_000


def kept_bytes(broker: Broker) -> int:
    """Return the bytes of the messages of the topic "t" that are in the store because no group was bound."""
    store = broker.core.store
    rows = store.read_unrouted(store.topics["t"], 0, 1 << 30)
    return sum(len(blob) for _, record in rows if record is not None for blob in record.blobs)


def large(count: int, message_type: str = "a") -> list[Message]:
    return [Message("t", message_type, b"x" * MESSAGE_BYTES) for _ in range(count)]


def slow_reads(broker: Broker, monkeypatch: pytest.MonkeyPatch, name: str, seconds: float) -> Callable[[], int]:
    """Make each call of a reading method of the store take so long; return what counts them."""
    store, calls = broker.core.store, 0
    read = getattr(store, name)

    def read_slowly(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        time.sleep(seconds)
        return read(*args)

    monkeypatch.setattr(store, name, read_slowly)
    return lambda: calls


async def test_the_cap_of_kept_messages_holds_and_is_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kiteq.recovery, "UNROUTED_BYTES_MAX", 10_000)
    monkeypatch.setattr(kiteq.recovery, "CHECK_SECONDS", 0.02)
    async with running("memory://") as broker:
        producer = await connect(broker, "p")
        for _ in range(3):
            for _ in range(200):
                await producer.publish([Message("t", "a", b"x")])
            await trio.sleep(0.1)
        assert kept_bytes(broker) <= 10_000
        assert broker.core.unrouted_bytes == kept_bytes(broker)


async def test_what_was_kept_before_a_restart_is_counted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(folder) as broker:
        await (await connect(broker, "p")).publish(numbered(5))
    async with running(folder) as broker:
        reads = slow_reads(broker, monkeypatch, "read_unrouted_sizes", 0.1)
        await (await connect(broker, "p")).publish(numbered(3, start=5))  # before the end of the measurement
        await trio.sleep(0.2)
        assert (reads(), broker.core.unrouted_bytes) == (1, kept_bytes(broker))


async def test_a_group_is_refused_when_what_it_wants_to_take_over_does_not_fit() -> None:
    async with running("memory://", store_limit=2_000_000) as broker:
        producer = await connect(broker, "p")
        for message in large(12):
            await producer.publish([message])
        with pytest.raises(Refused) as refused:
            await connect(broker, "g", direct("t", "a", start="first"), window=100)
        assert (refused.value.code, refused.value.temporary) == ("store_full", True)
        assert await producer.admin("group.list") == []
        other = await connect(broker, "g", direct("t", "a"), window=100)
        await trio.sleep(0.1)  # the room of what had been copied is free again
        assert (await producer.publish(large(1))).groups == 1
        await other.ack(await other.take(1))
        assert (await producer.row("g"))["pending_bytes"] == 0


@pytest.mark.parametrize("before", [["b"], ["b", "a"]])
async def test_a_binding_is_taken_back_when_what_it_wants_to_take_over_does_not_fit(before: list[str]) -> None:
    async with running("memory://", store_limit=2_000_000) as broker:
        producer = await connect(broker, "p")
        for message in large(12):
            await producer.publish([message])
        group = await connect(broker, "g", *(direct("t", message_type) for message_type in before))
        with pytest.raises(Refused):
            await group.ask(packets.Subscribe, packets.Subscribed, [to_wire(direct("t", "a", start="first"))])
        row = await producer.row("g")
        assert [binding["pattern"] for binding in row["bindings"]] == before
        await group.credit(100)
        copied = await group.take(row["pending"])
        await group.ack(copied)
        assert (await producer.row("g"))["pending_bytes"] == 0


async def test_a_greeting_may_take_longer_than_the_time_to_greet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kiteq.remoting.session, "UNAUTHENTICATED_SECONDS_MAX", 0.05)
    async with running("memory://") as broker:
        await (await connect(broker, "p")).publish(numbered(3))
        reads = slow_reads(broker, monkeypatch, "read_unrouted", 0.2)
        client = await connect(broker, "g", direct("t", "a", start="first"), window=10)
        assert [one.number for one in await client.take(3)] == [0, 1, 2]
        assert reads() == 2  # the second one for what came meanwhile


async def test_two_connections_of_a_group_take_over_once(
    server: Broker, producer: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await producer.publish(numbered(50))
    reads = slow_reads(server, monkeypatch, "read_unrouted", 0.05)
    first, second = await open_raw(server), await open_raw(server)
    async with trio.open_nursery() as nursery:
        for client in (first, second):
            nursery.start_soon(client.hello, "g", [direct("t", "a", start="first")])
    await first.credit(100)
    await first.ack(await first.take(50))
    await producer.wait_row("g", pending=0)
    assert reads() == 2  # the second one for what came meanwhile
    assert list(server.core.store.topics["t"].index.entries()) == []
    assert server.core.taking_over == {}


async def test_a_new_binding_of_a_group_takes_over_what_its_older_ones_did_not(
    server: Broker, producer: RawClient
) -> None:
    await producer.publish(numbered(2))
    group = await connect(server, "g", direct("t", "a", start="first"), window=100)
    await producer.publish(numbered(3, message_type="b", start=2))
    await producer.publish(numbered(1, start=5))
    assert [one.number for one in await group.take(3)] == [0, 1, 5]
    await group.ask(packets.Subscribe, packets.Subscribed, [to_wire(fanout("t", start="first"))])
    await producer.publish(numbered(1, message_type="b", start=6))
    taken = await group.take(4)
    assert [one.number for one in taken] == [2, 3, 4, 6]
    for binding in (fanout("t", start="first"), direct("t", "b", start="latest")):
        await group.ask(packets.Subscribe, packets.Subscribed, [to_wire(binding)])
    await group.take_nothing(0.05)


async def test_what_a_binding_took_over_it_takes_over_once_also_when_it_is_made_as_latest_between(
    server: Broker, producer: RawClient
) -> None:
    await producer.publish(numbered(1))
    for number, start in enumerate(("latest", "first", "latest", "first")):
        consumer = await connect(server, "g", fanout("t", start=start), window=5)
        if number == 1:
            await consumer.ack(await consumer.take(1))
        else:
            await consumer.take_nothing()
        await consumer.goodbye()


async def test_nothing_is_missed_or_doubled_while_a_bound_group_binds_more_under_load(server: Broker) -> None:
    producer = await connect(server, "p")
    group = await connect(server, "g", direct("t", "a"), window=10_000)
    sent = 0
    bound = trio.Event()

    async def publish() -> None:
        nonlocal sent
        while not bound.is_set() or sent < 200:
            await producer.publish([numbered(1, message_type="ab"[at], start=sent + at)[0] for at in (0, 1)])
            sent += 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        await trio.sleep(0.02)
        await group.ask(packets.Subscribe, packets.Subscribed, [to_wire(fanout("t", start="first"))])
        bound.set()
    numbers = [one.number for one in await group.take(sent)]
    assert sorted(numbers) == list(range(sent))
    assert [number for number in numbers if number % 2] == list(range(1, sent, 2))
    await group.take_nothing(0.05)


async def test_what_a_producer_was_refused_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running("memory://") as broker:
        producer = await connect(broker, "p")
        await producer.publish(numbered(1))
        tables = broker.core.store.tables
        apply = tables.apply

        def refuse_unrouted(rows: list[Row]) -> None:
            time.sleep(0.02)
            used = {table for table, _, _ in rows}
            if Table.UNROUTED in used and Table.LOG not in used:  # else what is copied would be refused too
                raise StoreFull("no room")
            apply(rows)

        monkeypatch.setattr(tables, "apply", refuse_unrouted)
        group = await open_raw(broker)
        accepted, refused = [0], 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(group.hello, "g", [fanout("t", start="first")])
            for number in range(1, 100):
                blob = numbered(1, start=number)[0].encoded()
                try:
                    receipts = await producer.ask(packets.Publish, packets.Receipts, [blob])
                except Refused:
                    refused += 1
                    continue
                accepted.append(number)
                if receipts.groups:
                    break
        assert refused
        await group.credit(100)
        assert sorted(one.number for one in await group.take(len(accepted))) == accepted
        await group.take_nothing(0.1)


async def test_dropping_what_an_absent_group_is_owed_stops_nothing_and_ends_when_it_returns(
    server: Broker, producer: RawClient, clock: JumpingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kiteq.recovery, "CHECK_SECONDS", 0.02)
    await (await connect(server, "g", fanout("t", persistent=False))).goodbye()
    consumer = await connect(server, "g")
    await producer.publish(numbered(4))
    await consumer.goodbye()
    reads = slow_reads(server, monkeypatch, "read_log", 0.2)
    await trio.sleep(0.05)
    clock.advance(11)
    with trio.fail_after(5):
        while not reads():  # noqa: ASYNC110 a thread counts them
            await trio.sleep(0.01)
    usages = slow_reads(server, monkeypatch, "usage", 0)
    await trio.sleep(0.1)
    assert usages() > 1
    consumer = await connect(server, "g", window=10)
    assert [one.number for one in await consumer.take(4)] == [0, 1, 2, 3]
