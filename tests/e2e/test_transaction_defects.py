"""Rare meetings of transactions with a full store, a slow disk, a restart, and clients that ask for too much."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.checking import tidy
from kiteq.message import Message
from kiteq.remoting import packets
from kiteq.store.tables import Table
from tests.e2e.faulty import codes, full_store, held_disk, held_reads, nothing_moves
from tests.e2e.wire import TICK_SECONDS, JumpingClock, Refused, connect, numbered, running

CONFLICT = "transaction_conflict"
UNKNOWN = "unknown_transaction"


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
        with ExitStack() as disk:
            with held_reads(broker, "get") as begun:
                nursery.start_soon(tidy, broker.core)
                assert await trio.to_thread.run_sync(begun.wait, 10)
                disk.enter_context(held_disk(broker))
                await producer.send(packets.Decide(77, packets.DECISION_ROLLBACK, [late.id]))
                await nothing_moves(broker)
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
        with ExitStack() as disk:
            with held_reads(broker, "get") as begun:
                nursery.start_soon(tidy, broker.core)
                assert await trio.to_thread.run_sync(begun.wait, 10)
                disk.enter_context(held_disk(broker))
                await producer.send(packets.Decide(77, packets.DECISION_ROLLBACK, [late.id]))
                await nothing_moves(broker)
            await nothing_moves(broker)
        assert (await producer.wait(packets.Decided, 77)).exceptions == []
        await tidy(broker.core)
        assert broker.core.store.tables.scan(Table.HALF, b"", b"\xff" * 9) == []


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


async def test_a_decision_that_waits_for_another_one_does_not_disturb_the_end_of_the_broker(folder: Path) -> None:
    [message] = numbered(1)
    with ExitStack() as disk:
        async with running(folder) as broker:
            producer = await connect(broker, "producers")
            await producer.prepare([message])
            disk.enter_context(held_disk(broker))
            await producer.send(packets.Decide(77, packets.DECISION_COMMIT, [message.id] * 2))
            await nothing_moves(broker)
            threading.Timer(0.1, disk.close).start()
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        assert codes(await producer.roll_back(message.id)) == [(0, CONFLICT)]


async def test_when_a_transaction_was_parked_does_not_change_with_later_answers(folder: Path) -> None:
    clock = JumpingClock()
    [message] = numbered(1)
    parked_ms = []
    async with running(folder, clock, check_limit=1) as broker:
        producer = await connect(broker, "producers")
        await producer.prepare([message])
        for _ in range(2):
            clock.advance(4000)
            asked = await producer.wait(packets.Ask)
            await producer.decide(packets.DECISION_UNKNOWN, asked.tokens)
            parked_ms.append((await producer.admin("tx.show", id=message.id.hex()))["parked_ms"])
    assert None not in parked_ms
    assert parked_ms[0] == parked_ms[1]
