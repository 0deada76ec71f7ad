"""Rare meetings of transactions with a full store, a slow disk, a restart, and clients that ask for too much."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.checking import tidy
from kiteq.errors import StoreFull
from kiteq.message import Message
from kiteq.pipe.core import Core
from kiteq.pipe.peer import Peer
from kiteq.remoting import packets
from kiteq.store.halves import Halves
from kiteq.store.tables import Row, Table
from kiteq.store.writer import Submission
from tests.e2e.wire import TICK_SECONDS, JumpingClock, Refused, connect, numbered, running

CONFLICT = "transaction_conflict"
UNKNOWN = "unknown_transaction"


def codes(exceptions: list[list[object]]) -> list[tuple[object, object]]:
    return [(exception[0], exception[1]) for exception in exceptions]


@contextmanager
def held_disk(broker: Broker) -> Iterator[None]:
    """Let no commit end before the block does."""
    tables, go_on = broker.core.store.tables, threading.Event()
    apply = tables.apply

    def wait(rows: list[Row]) -> None:
        go_on.wait(10)
        apply(rows)

    try:
        with patch.object(tables, "apply", wait):
            yield
    finally:
        go_on.set()


@contextmanager
def full_store(broker: Broker) -> Iterator[None]:
    """Let the store have no room for messages, but for what is less."""
    tables = broker.core.store.tables
    apply = tables.apply

    def refuse(rows: list[Row]) -> None:
        if any(value is not None and table in (Table.HALF, Table.LOG, Table.UNROUTED) for table, _, value in rows):
            raise StoreFull("no room")
        apply(rows)

    with patch.object(tables, "apply", refuse):
        yield


async def nothing_moves(broker: Broker) -> None:
    """Wait until what was sent was read."""
    await trio.sleep(0.05)


async def test_a_refused_commit_keeps_the_messages_beside_a_rollback_of_the_same_frame(folder: Path) -> None:
    refused, rolled_back = numbered(2)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        other = await connect(broker, "producers")
        await producer.prepare([refused, rolled_back])
        with full_store(broker):
            with held_disk(broker):
                await producer.send(packets.Decide(77, packets.DECISION_COMMIT, [refused.id]))
                await nothing_moves(broker)
                await other.send(packets.Decide(78, packets.DECISION_ROLLBACK, [rolled_back.id]))
                await nothing_moves(broker)
            answer = await producer.wait(packets.Decided, 77)
            assert codes(answer.exceptions) == [(0, "store_full")]
            assert (await other.wait(packets.Decided, 78)).exceptions == []
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=10)
        assert await producer.commit(refused.id) == []
        assert [delivery.number for delivery in await consumer.take(1)] == [0]
        assert codes(await producer.commit(rolled_back.id)) == [(0, CONFLICT)]


async def test_a_decision_under_way_while_its_row_is_rewritten_stays_decided(folder: Path) -> None:
    early, late, left = numbered(3)
    async with running(folder) as broker, trio.open_nursery() as nursery:
        producer = await connect(broker, "producers")
        await producer.prepare([early, late, left])
        await producer.roll_back(early.id)
        tables, reads, go_on = broker.core.store.tables, threading.Event(), threading.Event()
        get = tables.get

        def slow_get(table: Table, key: bytes) -> bytes | None:
            reads.set()
            go_on.wait(10)
            return get(table, key)

        with patch.object(tables, "get", slow_get):
            nursery.start_soon(tidy, broker.core)
            await trio.to_thread.run_sync(reads.wait, 10)
            with held_disk(broker):
                await producer.send(packets.Decide(77, packets.DECISION_ROLLBACK, [late.id]))
                await nothing_moves(broker)
                go_on.set()
                await nothing_moves(broker)
            assert (await producer.wait(packets.Decided, 77)).exceptions == []
        await tidy(broker.core)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        assert codes(await producer.commit(early.id, late.id, left.id)) == [(0, CONFLICT), (1, CONFLICT)]


async def test_a_row_that_two_decisions_under_way_empty_is_removed(folder: Path) -> None:
    one, other = numbered(2)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        second = await connect(broker, "producers")
        await producer.prepare([one, other])
        with held_disk(broker):
            await producer.send(packets.Decide(77, packets.DECISION_COMMIT, [one.id]))
            await nothing_moves(broker)
            await second.send(packets.Decide(78, packets.DECISION_ROLLBACK, [other.id]))
            await nothing_moves(broker)
        await producer.wait(packets.Decided, 77)
        await second.wait(packets.Decided, 78)
        await tidy(broker.core)
        assert broker.core.store.tables.scan(Table.HALF, b"", b"\xff" * 9) == []
        assert not broker.core.store.halves.touched


async def test_a_row_is_not_written_again_behind_the_decision_that_removes_it(folder: Path) -> None:
    early, late = numbered(2)
    async with running(folder) as broker, trio.open_nursery() as nursery:
        producer = await connect(broker, "producers")
        await producer.prepare([early, late])
        await producer.roll_back(early.id)
        tables, reads, go_on = broker.core.store.tables, threading.Event(), threading.Event()
        get = tables.get

        def slow_get(table: Table, key: bytes) -> bytes | None:
            reads.set()
            go_on.wait(10)
            return get(table, key)

        with patch.object(tables, "get", slow_get):
            nursery.start_soon(tidy, broker.core)
            await trio.to_thread.run_sync(reads.wait, 10)
            with held_disk(broker):
                await producer.send(packets.Decide(77, packets.DECISION_ROLLBACK, [late.id]))
                await nothing_moves(broker)
                go_on.set()
                await nothing_moves(broker)
            assert (await producer.wait(packets.Decided, 77)).exceptions == []
        await tidy(broker.core)
        assert tables.scan(Table.HALF, b"", b"\xff" * 9) == []


class NeverWalked(list[int]):
    """A list that may become long, so nothing may look at all of it for one transaction."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("all client instances were looked at for one")


def test_undecided_transactions_of_many_clients_cost_each_no_more() -> None:
    halves = Halves()
    halves._instance_uses = NeverWalked()

    def prepare(number: int) -> tuple[list[bytes], list[int]]:
        ids = [number.to_bytes(16, "big")]
        slots = halves.restore(ids, [number], number, group="p", instance=ids[0], prepared_ms=1_000)
        return ids, slots

    kept = [prepare(number) for number in range(1, 11)]
    for number in range(11, 1_000):
        halves.forget(*prepare(number))
    assert len(halves.instances) == 11
    assert [halves.instance_id(slots[0]) for _, slots in kept] == [ids[0] for ids, _ in kept]


async def test_a_commit_from_the_disk_waits_for_what_was_added_just_now(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kiteq.store.half_cache.HALF_CACHE_BYTES_MAX", 1)
    first, added = numbered(2)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        other = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=10)
        await producer.prepare([first])
        with held_disk(broker):
            await producer.send(packets.Enlist(77, first.id, [added.encoded()]))
            await nothing_moves(broker)
            await other.send(packets.Decide(78, packets.DECISION_COMMIT, [first.id]))
            await nothing_moves(broker)
        assert (await producer.wait(packets.Prepared, 77)).exceptions == []
        assert (await other.wait(packets.Decided, 78)).exceptions == []
        assert [delivery.number for delivery in await consumer.take(2)] == [0, 1]


async def test_a_message_of_another_transaction_is_not_added_in_silence(folder: Path) -> None:
    given_up, kept, message = numbered(3)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=10)
        await producer.prepare([given_up])
        await producer.enlist(given_up.id, [message])
        await producer.roll_back(given_up.id)
        prepared = await producer.prepare([kept])
        assert codes((await producer.enlist(kept.id, [message])).exceptions) == [(0, "id_reused")]
        again = Message("t", "a", message.body)
        assert (await producer.enlist(kept.id, [again])).handles == prepared.handles
        assert (await producer.enlist(kept.id, [again])).handles == prepared.handles
        assert await producer.commit(kept.id) == []
        assert [delivery.number for delivery in await consumer.take(2)] == [1, 2]
        await consumer.take_nothing()


@pytest.mark.parametrize("adds", [False, True])
async def test_a_repetition_of_what_is_refused_is_refused_alike(folder: Path, adds: bool) -> None:
    first, message = numbered(2)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        again = await connect(broker, "producers")
        await producer.prepare([first])
        sent = packets.Prepare(77, [message.encoded()], 1, 0)
        with full_store(broker):
            with held_disk(broker):
                for client in (producer, again):
                    await client.send(packets.Enlist(77, first.id, [message.encoded()]) if adds else sent)
                    await nothing_moves(broker)
            with pytest.raises(Refused, match="no room"):
                await producer.wait(packets.Prepared, 77)
            [[_, code, _, temporary]] = (await again.wait(packets.Prepared, 77)).exceptions
            assert (code, temporary) == ("store_full", True)
        repeated = await (again.enlist(first.id, [message]) if adds else again.prepare([message]))
        assert repeated.exceptions == []


async def test_a_damaged_row_does_not_keep_decisions_for_ever(folder: Path) -> None:
    decided, left = numbered(2)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        await producer.prepare([decided, left])
        await producer.roll_back(decided.id)
        store = broker.core.store
        [(key, value)] = store.tables.scan(Table.HALF, b"", b"\xff" * 9)
        damaged = bytes([value[0] ^ 1]) + value[1:]
        store.tables.apply([(Table.HALF, key, damaged)])
        await tidy(broker.core)
        assert store.halves.clean_below == store.halves.next_decision
        assert store.tables.get(Table.QUARANTINE, key) == damaged
        assert (await producer.admin("stat"))["damaged_records"] == 1
        assert await producer.roll_back(left.id) == []
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        assert codes(await producer.commit(decided.id, left.id)) == [(0, CONFLICT), (1, CONFLICT)]


async def test_decisions_of_a_time_when_the_clock_was_ahead_are_dropped_an_hour_after_the_next(folder: Path) -> None:
    clock = JumpingClock()
    clock.advance(365 * 86_400)
    first, second = numbered(2)
    async with running(folder, clock) as broker:
        producer = await connect(broker, "producers")
        await producer.prepare([first])
        await producer.roll_back(first.id)
    clock = JumpingClock()
    async with running(folder, clock) as broker:
        producer = await connect(broker, "producers")
        await producer.prepare([second])
        await producer.roll_back(second.id)
        await tidy(broker.core)
        assert codes(await producer.commit(first.id, second.id)) == [(0, CONFLICT), (1, CONFLICT)]
        clock.advance(3601)
        await tidy(broker.core)
        assert broker.core.store.tables.scan(Table.DECISIONS, b"", b"\xff" * 9) == []


async def test_a_check_is_not_put_off_because_messages_are_being_added(folder: Path) -> None:
    clock = JumpingClock()
    first, added = numbered(2)
    async with running(folder, clock) as broker:
        producer = await connect(broker, "producers")
        await producer.prepare([first])
        with held_disk(broker):
            await producer.send(packets.Enlist(77, first.id, [added.encoded()]))
            await nothing_moves(broker)
            clock.advance(7)
            await trio.sleep(TICK_SECONDS)
        assert (await producer.wait(packets.Ask)).messages == [first.encoded()]


async def test_transactions_of_a_time_when_the_clock_was_ahead_are_asked_about(folder: Path) -> None:
    clock = JumpingClock()
    clock.advance(365 * 86_400)
    [message] = numbered(1)
    async with running(folder, clock) as broker:
        producer = await connect(broker, "producers", instance=b"1" * 16)
        await producer.prepare([message])
    async with running(folder) as broker:
        producer = await connect(broker, "producers", instance=b"1" * 16)
        assert (await producer.wait(packets.Ask)).messages == [message.encoded()]


async def test_a_new_transaction_in_the_place_of_a_parked_one_is_not_asked_about_early(folder: Path) -> None:
    clock = JumpingClock()
    parked, new = numbered(2)
    async with running(folder, clock, check_limit=1) as broker:
        producer = await connect(broker, "producers")
        await producer.prepare([parked])
        clock.advance(7)
        asked = await producer.wait(packets.Ask)
        await producer.decide(packets.DECISION_UNKNOWN, asked.tokens)
        assert await producer.roll_back(parked.id) == []
        await producer.prepare([new])
        await connect(broker, "producers")
        await producer.asked_nothing()


async def test_the_decisions_about_many_old_transactions_are_found(server: Broker) -> None:
    producer = await connect(server, "producers")
    committed, rolled_back, unheard_of = numbered(20), numbered(20, start=20), numbered(20, start=40)
    await producer.prepare(committed + rolled_back)
    for message in committed:
        assert await producer.commit(message.id) == []
    assert await producer.roll_back(*[message.id for message in rolled_back]) == []
    ids = [message.id for message in committed + rolled_back + unheard_of]
    expected = [(place, CONFLICT) for place in range(20, 40)] + [(place, UNKNOWN) for place in range(40, 60)]
    assert codes(await producer.commit(*ids)) == expected


async def test_refused_messages_do_not_count_as_added(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, added = numbered(2)
    monkeypatch.setattr("kiteq.pipe.preparing.TRANSACTION_ADDED_BYTES_MAX", len(added.encoded()))
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=10)
        await producer.prepare([first])
        with full_store(broker), pytest.raises(Refused, match="no room"):
            await producer.enlist(first.id, [added])
        assert (await producer.enlist(first.id, [added])).exceptions == []
        assert await producer.commit(first.id) == []
        assert [delivery.number for delivery in await consumer.take(2)] == [0, 1]


async def test_a_large_commit_from_the_disk_is_in_memory_one_step_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kiteq.pipe.transactions.COMMIT_BYTES_MAX", 1)
    messages = numbered(50)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        await producer.prepare(messages)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        await connect(broker, "members", fanout("t"))
        appends: list[int] = []
        submit = broker.core.store.writer.submit

        def count(submission: Submission) -> None:
            appends.append(len(submission.appends))
            submit(submission)

        with patch.object(broker.core.store.writer, "submit", count), held_disk(broker):
            await producer.send(packets.Decide(77, packets.DECISION_COMMIT, [message.id for message in messages]))
            await trio.sleep(TICK_SECONDS)
            assert sum(appends) <= 1
        assert (await producer.wait(packets.Decided, 77)).exceptions == []


async def test_a_client_that_floods_the_broker_with_searches_is_read_no_further(server: Broker) -> None:
    producer = await connect(server, "producers")
    go_on, searches = threading.Event(), 0
    scan = server.core.store.tables.scan

    def slow_scan(table: Table, *arguments: bytes, bytes_max: int | None = None) -> list[tuple[bytes, bytes]]:
        go_on.wait(10)
        return scan(table, *arguments, bytes_max=bytes_max)

    start_reading = server.core.start_reading

    def count(peer: Peer | None, work: Callable[[], Awaitable[None]]) -> None:
        nonlocal searches
        searches += 1
        start_reading(peer, work)

    unknown = [packets.Decide(request, packets.DECISION_COMMIT, [b"x" * 16] * 1000) for request in range(1, 201)]
    with (
        patch.object(server.core.store.tables, "scan", slow_scan),
        patch.object(Core, "start_reading", lambda _, *what: count(*what)),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(producer.send, *unknown)
            await trio.sleep(TICK_SECONDS)
            assert 0 < searches < 100
            go_on.set()
            for request in range(1, 201):
                assert len((await producer.wait(packets.Decided, request)).exceptions) == 1000
