"""Reads rows of transactions from the disk; called in threads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from typing import Final, NamedTuple
from zlib import crc32

from kiteq.errors import KiteQError
from kiteq.message import CRC_RESIDUE
from kiteq.store.half_records import (
    COUNTER_KEY,
    CheckState,
    Decision,
    DecisionRow,
    HalfHead,
    decided_ids,
    find_decision,
    messages_of,
    pack_half,
    parse_checks,
    parse_decisions,
    parse_half_head,
)
from kiteq.store.tables import Row, Table, Tables

__all__ = [
    "HalfRead",
    "decision_rows",
    "each_half",
    "find_decisions",
    "read_checks",
    "read_halves",
    "rewritten",
]

DECISION_ROWS_SEARCHED: Final = 1_024
"""Rows of decisions read at once, the newest first: what is asked for again was usually decided just now."""

FEW_IDS: Final = 4
"""Looking so many ids up in the bytes of a row costs less than cutting the row into its ids."""


class HalfRead(NamedTuple):
    """One transaction with its messages; None for one that is damaged."""

    head: HalfHead
    blobs: list[bytes | None]


def read_halves(
    tables: Tables, wanted: Mapping[int, Sequence[int]], *, bytes_max: int | None = None
) -> dict[int, HalfRead]:
    """Return transactions by handle; `wanted` are their handles with the rows each of them is in.

    A transaction whose row is gone (it was decided) or damaged is left out. bytes_max: stop after the transaction
    that reaches it; at least the first one was looked at.
    """
    found: dict[int, HalfRead] = {}
    size = 0
    for handle, half in each_half(tables, wanted):
        found[handle] = half
        size += sum([len(blob) for blob in half.blobs if blob is not None])
        if bytes_max is not None and size >= bytes_max:
            break
    return found


def each_half(tables: Tables, wanted: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, HalfRead]]:
    """Return transactions and their handles as `read_halves` does, one after the other."""
    row = _OpenRow(tables)
    for handle, rows in wanted.items():
        blobs: list[bytes | None] = []
        heads = [row.read(number, handle, blobs) for number in rows]
        first = heads[0]
        if first is not None and None not in heads:
            yield handle, HalfRead(first, blobs)


class _OpenRow:
    """The row that was read last: transactions asked for together are often neighbours in one."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._number = -1
        self._value = b""
        self._head: HalfHead | None = None
        self._firsts: list[int] = []

    def read(self, number: int, handle: int, blobs: list[bytes | None]) -> HalfHead | None:
        """Add the messages of a transaction in a row to `blobs`, None for a damaged one; return the row's head."""
        if number != self._number:
            self._open(number)
        head = self._head
        place = -1 if head is None else bisect_left(head.handles, handle)
        if head is None or place == len(head.handles) or head.handles[place] != handle:
            return None
        blobs += messages_of(self._value, head, self._firsts[place], self._firsts[place + 1])
        return head

    def _open(self, number: int) -> None:
        key = COUNTER_KEY.pack(number)
        self._number, self._head = number, None
        self._value = self._tables.get(Table.HALF, key) or b""
        with suppress(KiteQError):
            self._head = parse_half_head(key, self._value)
            self._firsts = list(accumulate(self._head.sizes, initial=0))


def read_checks(tables: Tables, handle: int) -> CheckState:
    """Return how far the checks of a transaction are."""
    return parse_checks(tables.get(Table.CHECKS, COUNTER_KEY.pack(handle)))


def find_decisions(
    tables: Tables, transaction_ids: Iterable[bytes], below: int, *, group: str | None = None
) -> dict[bytes, tuple[DecisionRow, Decision]]:
    """Return what was decided, by transaction id; what is not known any more is left out.

    below: the number of the next decision. group: whose transactions; None for the latest of anybody.
    """
    wanted = set(transaction_ids)
    found: dict[bytes, tuple[DecisionRow, Decision]] = {}
    for rows in _windows(tables, below):
        for key, value in rows:
            for transaction_id in list(wanted) if len(wanted) <= FEW_IDS else wanted.intersection(decided_ids(value)):
                decided = find_decision(key, value, transaction_id, group)
                if decided is not None:
                    found[transaction_id] = decided
                    wanted.discard(transaction_id)
        if not wanted:
            break
    return found


def decision_rows(tables: Tables, below: int) -> Iterator[tuple[int, DecisionRow]]:
    """Return the rows of decisions with their numbers, the newest first."""
    for rows in _windows(tables, below):
        for key, value in rows:
            try:
                yield COUNTER_KEY.unpack(key)[0], parse_decisions(key, value)
            except KiteQError:
                continue


def _windows(tables: Tables, below: int) -> Iterator[list[tuple[bytes, bytes]]]:
    """Return the rows of decisions in windows, the newest first, down to the oldest that is kept."""
    oldest = tables.scan(Table.DECISIONS, b"", b"\xff" * 9, bytes_max=1)
    first = COUNTER_KEY.unpack(oldest[0][0])[0] if oldest else below
    while below > first:
        start = max(first, below - DECISION_ROWS_SEARCHED)
        rows = tables.scan(Table.DECISIONS, COUNTER_KEY.pack(start), COUNTER_KEY.pack(below))
        rows.reverse()
        yield rows
        below = start


def rewritten(row: int, value: bytes, stays: Callable[[bytes | None, int], bool]) -> Row | None:
    """Return a row of half messages with only some of its transactions; None when the row is damaged.

    stays: whether a transaction does, by its id, None when its first message is damaged, and its handle.
    """
    key = COUNTER_KEY.pack(row)
    try:
        head = parse_half_head(key, value)
    except KiteQError:
        return None
    raw = [value[head.size + start : head.size + end] for start, end in pairwise((0, *head.ends))]
    handles: list[int] = []
    sizes: list[int] = []
    blobs: list[bytes] = []
    for handle, (start, end) in zip(head.handles, pairwise((0, *accumulate(head.sizes))), strict=True):
        if stays(raw[start][:16] if crc32(raw[start]) == CRC_RESIDUE else None, handle):
            handles.append(handle)
            sizes.append(end - start)
            blobs += raw[start:end]
    packed = pack_half(key, head.group, head.instance, head.prepared_ms, head.check_ms, handles, sizes, blobs)
    return (Table.HALF, key, packed)
