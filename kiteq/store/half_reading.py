"""Reads rows of transactions from the disk; called in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from kiteq.errors import KiteQError
from kiteq.store.half_records import (
    COUNTER_KEY,
    CheckState,
    Decision,
    DecisionRow,
    HalfHead,
    find_decision,
    pack_half,
    parse_checks,
    parse_decisions,
    parse_half,
    parse_half_head,
)
from kiteq.store.tables import Row, Table, Tables

__all__ = [
    "HalfRead",
    "decision_rows",
    "find_decisions",
    "read_checks",
    "read_halves",
    "rewritten",
    "scan_halves",
]

DECISION_ROWS_SEARCHED: Final = 1_024
"""Rows of decisions read at once, the newest first: what is asked for again was usually decided just now."""
PAGE_BYTES: Final = 1 << 20


class HalfRead(NamedTuple):
    """One transaction with its messages; None for one that is damaged."""

    head: HalfHead
    blobs: list[bytes | None]


def read_halves(tables: Tables, rows: Iterable[int]) -> dict[int, HalfRead]:
    """Return the transactions of rows, by handle; later messages of one follow its earlier ones.

    A row that is gone (its transactions were decided) or damaged is left out.
    """
    found: dict[int, HalfRead] = {}
    for row in sorted(set(rows)):
        key = COUNTER_KEY.pack(row)
        value = tables.get(Table.HALF, key)
        if value is None:
            continue
        try:
            record = parse_half(key, value)
        except KiteQError:
            continue
        for handle, blobs in record.parts:
            if handle in found:
                found[handle].blobs.extend(blobs)
            else:
                found[handle] = HalfRead(record.head, blobs)
    return found


def scan_halves(tables: Tables, start: int) -> tuple[list[tuple[int, HalfRead]], int | None]:
    """Return a page of (handle, transaction) from a row on, oldest first, and where the next page starts."""
    rows = tables.scan(Table.HALF, COUNTER_KEY.pack(start), b"\xff" * 9, bytes_max=PAGE_BYTES)
    found: list[tuple[int, HalfRead]] = []
    for key, value in rows:
        try:
            record = parse_half(key, value)
        except KiteQError:
            continue
        found += [(handle, HalfRead(record.head, blobs)) for handle, blobs in record.parts if not record.head.enlisted]
    return found, COUNTER_KEY.unpack(rows[-1][0])[0] + 1 if rows else None


def read_checks(tables: Tables, handle: int) -> CheckState:
    """Return how far the checks of a transaction are."""
    return parse_checks(tables.get(Table.CHECKS, COUNTER_KEY.pack(handle)))


def find_decisions(
    tables: Tables, transaction_ids: Iterable[bytes], below: int
) -> dict[bytes, tuple[DecisionRow, Decision]]:
    """Return what was decided, by transaction id; what is not known any more is left out.

    below: the number of the next decision.
    """
    wanted = set(transaction_ids)
    found: dict[bytes, tuple[DecisionRow, Decision]] = {}
    for rows in _windows(tables, below):
        for key, value in rows:
            for transaction_id in list(wanted):
                decided = find_decision(key, value, transaction_id)
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


def rewritten(row: int, value: bytes, stays: Callable[[bytes, int], bool]) -> Row | None:
    """Return a row of half messages with only some of its transactions; None when the row is damaged.

    stays: whether a transaction does, by its id and handle.
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
        if stays(raw[start][:16], handle):
            handles.append(handle)
            sizes.append(end - start)
            blobs += raw[start:end]
    packed = pack_half(key, head.group, head.instance, head.prepared_ms, head.check_ms, handles, sizes, blobs)
    return (Table.HALF, key, packed)
