"""A history of transactions, written through the store's writer, and what must be known after each of its commits."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import trio
import trio.testing

from kiteq.checking import tidy
from kiteq.message import Message
from kiteq.store.half_reading import find_decisions, read_checks, read_halves
from kiteq.store.half_records import COUNTER_KEY, CheckState, pack_checks
from kiteq.store.halves import Halves, State
from kiteq.store.memory import MemoryTables
from kiteq.store.tables import Row, Table, Tables
from tests.store.reopening import KeptTables, OpenStore

CHECK_MS = 6_000
END = b"\xff" * 16


@dataclass
class Known:
    """What is known of one transaction."""

    group: str
    instance: bytes
    handle: int
    due_ms: int
    blobs: list[bytes]
    asks: int = 0
    unknowns: int = 0
    parked: bool = False


@dataclass
class Expected:
    """What is durable after a commit."""

    undecided: dict[bytes, Known] = field(default_factory=dict)
    decided: dict[bytes, bool] = field(default_factory=dict)
    forgotten: set[bytes] = field(default_factory=set)
    """Decided so long ago that the decision may be gone."""


class History:
    """Each verb is one commit. `expected[n]` is what must be known after the first n commits since the start."""

    def __init__(self) -> None:
        self.tables = KeptTables()
        self.opened = OpenStore(self.tables)
        self.now_ms = 1_000_000
        self._count = 0
        self.known = Expected()
        self.expected: list[Expected] = []
        self._note()

    @property
    def halves(self) -> Halves:
        return self.opened.store.halves

    def _note(self) -> None:
        """Every commit since the last note left what is known now."""
        missing = len(self.tables.applied) - len(self.expected) + 1
        self.expected += [deepcopy(self.known)] * missing

    def _commit(self, rows: Iterable[Row]) -> None:
        submission = self.opened.submission()
        submission.rows += rows
        self.opened.commit(submission)

    def _blob(self, size: int = 3) -> bytes:
        self._count += 1
        return Message("t", "a", b"x" * size, id=self._count.to_bytes(16, "big")).encoded()

    def prepare(self, group: str, instance: bytes, sizes: list[int]) -> None:
        blobs = [[self._blob() for _ in range(size)] for size in sizes]
        ids = [mine[0][:16] for mine in blobs]
        flat = [blob for mine in blobs for blob in mine]
        slots, row = self.halves.add(
            ids, sizes, flat, group=group, instance=instance, prepared_ms=self.now_ms, check_ms=CHECK_MS
        )
        self._commit([row])
        self.halves.opened(slots)
        for transaction_id, slot, mine in zip(ids, slots, blobs, strict=True):
            handle = self.halves.handle[slot]
            self.known.undecided[transaction_id] = Known(group, instance, handle, self.now_ms + CHECK_MS, mine)
        self._note()

    def enlist(self, transaction_id: bytes, count: int) -> None:
        slot = self.halves.find(transaction_id)
        assert slot is not None
        blobs = [self._blob() for _ in range(count)]
        self._commit([self.halves.enlist(slot, blobs, self.now_ms)])
        self.known.undecided[transaction_id].blobs += blobs
        self._note()

    def ask(self, transaction_id: bytes, *, unknown: bool, parked: bool) -> None:
        """Note an answer to a check, as the broker does."""
        known = self.known.undecided[transaction_id]
        slot = self.halves.find(transaction_id)
        assert slot is not None
        known.asks = self.halves.asks[slot] = known.asks + 1
        known.unknowns = self.halves.unknowns[slot] = known.unknowns + unknown
        if parked:
            self.halves.park(slot)
        known.parked |= parked
        known.due_ms = self.now_ms + 60_000
        state = CheckState(known.asks, known.unknowns, known.due_ms, self.now_ms if known.parked else 0, [])
        self._commit([(Table.CHECKS, COUNTER_KEY.pack(known.handle), pack_checks(state))])
        self._note()

    def _begin(self, ids: list[bytes], *, commit: bool) -> tuple[list[int], list[Row]]:
        _, _, slots, others = self.halves.take(ids, None)
        assert not others
        return slots, self.halves.decide(ids, slots, commit=commit, at_ms=self.now_ms, by="test", reason=None)

    def decide(self, ids: list[bytes], *, commit: bool) -> None:
        slots, rows = self._begin(ids, commit=commit)
        self._commit(rows)
        self.halves.forget(ids, slots)
        for one in ids:
            del self.known.undecided[one]
            self.known.decided[one] = commit
        self._note()

    def decide_in_vain(self, ids: list[bytes], *, commit: bool) -> None:
        """Take a decision that the store has no room for."""
        slots, _ = self._begin(ids, commit=commit)
        self.halves.undo(slots)
        for one in ids:
            self.known.undecided[one].parked = False  # in memory; on the disk it is as it was

    def tidy(self) -> None:
        """Rewrite and trim as the broker does now and then."""
        store = self.opened.store
        clock = SimpleNamespace(epoch_ms=lambda: self.now_ms)
        core: Any = SimpleNamespace(store=store, clock=clock)

        async def run() -> None:
            finished = False

            async def tidied() -> None:
                nonlocal finished
                await tidy(core)
                finished = True

            async with trio.open_nursery() as nursery:
                nursery.start_soon(tidied)
                while not finished:
                    await trio.testing.wait_all_tasks_blocked()
                    self.opened.commit()

        trio.run(run)
        self._note()

    def pass_time(self, seconds: int) -> None:
        self.now_ms += seconds * 1000
        if seconds >= 3_600:
            self.known.forgotten |= set(self.known.decided)
            self._note()

    def restart(self) -> None:
        self.opened = self.opened.again()
        self._note()

    def cut(self, commits: int, tables: Tables) -> None:
        """Write the first commits of the history to other tables."""
        for rows in self.tables.applied[:commits]:
            tables.apply(rows)


def check(tables: Tables, expected: Expected) -> None:
    """Open what is in the tables, and compare what is known with what must be."""
    opened = OpenStore(tables)  # type: ignore[arg-type]
    store = opened.store
    halves = store.halves
    assert len(halves) == len(expected.undecided)
    planned = {slot: due_ms for slots, due_ms in store.take_recovered().halves.checks for slot in slots}
    assert len(planned) == len(halves)
    slots = {one: slot for one in expected.undecided if (slot := halves.find(one)) is not None}
    assert slots.keys() == expected.undecided.keys()
    assert sorted(slots.values()) == sorted(halves.slots())
    found = read_halves(tables, halves.rows_of(slots.values()))
    for transaction_id, known in expected.undecided.items():
        slot = slots[transaction_id]
        assert halves.handle[slot] == known.handle
        assert halves.tally(slot).name == known.group
        assert halves.instance_id(slot) == known.instance
        assert (halves.asks[slot], halves.unknowns[slot]) == (known.asks, known.unknowns)
        assert halves.state[slot] == (State.PARKED if read_checks(tables, known.handle).parked_ms else State.OPEN)
        assert planned[slot] == known.due_ms
        assert found[known.handle].blobs == known.blobs
    for tally in halves.groups:
        mine = [slot for slot in slots.values() if halves.tally(slot) is tally]
        assert (tally.open, tally.parked) == (len(mine), sum(halves.state[slot] == State.PARKED for slot in mine))
    decisions = find_decisions(tables, expected.decided, halves.next_decision)
    assert expected.decided.keys() - expected.forgotten <= decisions.keys()
    assert all(expected.decided[one] == decision.committed for one, (_, decision) in decisions.items())
    assert halves.next_handle > max([known.handle for known in expected.undecided.values()], default=0)


def rows_in(tables: Tables, table: Table) -> list[tuple[bytes, bytes]]:
    return tables.scan(table, b"", END)


def again(tables: Tables) -> MemoryTables:
    """Return a copy of tables."""
    copy = MemoryTables(1 << 30)
    copy.apply([(table, key, value) for table in Table for key, value in rows_in(tables, table)])
    return copy
