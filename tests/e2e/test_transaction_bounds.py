"""What transactions cost at most: memory, and time for each, whatever clients do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.pipe.core import Core
from kiteq.pipe.peer import Peer
from kiteq.remoting import packets
from kiteq.store.halves import Halves
from kiteq.store.writer import Submission
from tests.e2e.faulty import codes, held_disk, held_reads
from tests.e2e.wire import TICK_SECONDS, JumpingClock, connect, numbered, running

CONFLICT = "transaction_conflict"
UNKNOWN = "unknown_transaction"


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
    searches = 0
    start_reading = Core.start_reading

    def count(core: Core, peer: Peer | None, work: Callable[[], Awaitable[None]]) -> None:
        nonlocal searches
        searches += 1
        start_reading(core, peer, work)

    unknown = [packets.Decide(request, packets.DECISION_COMMIT, [b"x" * 16] * 1000) for request in range(1, 201)]
    async with trio.open_nursery() as nursery:
        with patch.object(Core, "start_reading", count), held_reads(server, "scan"):
            nursery.start_soon(producer.send, *unknown)
            await trio.sleep(TICK_SECONDS)
            assert 0 < searches < 100
        for request in range(1, 201):
            assert len((await producer.wait(packets.Decided, request)).exceptions) == 1000


async def test_what_is_known_of_checks_is_read_a_page_at_a_time_at_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kiteq.store.half_recovery.SCAN_BYTES", 1)
    clock = JumpingClock()
    messages = numbered(6)
    async with running(folder, clock) as broker:
        producer = await connect(broker, "producers")
        await producer.prepare(messages[:2])
        await producer.prepare(messages[2:], check_after_ms=86_400_000)
        clock.advance(7)
        asked = (await producer.wait(packets.Ask)).tokens
        await producer.decide(packets.DECISION_UNKNOWN, asked)
        await producer.prepare(numbered(1, start=6), check_after_ms=86_400_000)
        assert await producer.roll_back(messages[0].id, messages[3].id) == []
    async with running(folder, clock) as broker:
        rows = await (await connect(broker, "admin")).admin("tx.list")
        assert [(row["id"] == messages[1].id.hex(), row["unknowns"]) for row in rows] == [(True, 1)] + [(False, 0)] * 4
