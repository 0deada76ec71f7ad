"""Finds the undecided transactions of a store when it is opened: what HALF holds and DECISIONS does not name."""

from __future__ import annotations

from array import array
from typing import Final, NamedTuple
from zlib import crc32

from kiteq.errors import KiteQError
from kiteq.store.half_records import COUNTER_KEY, first_ids, parse_checks, parse_decisions, parse_half_head
from kiteq.store.halves import Halves, State
from kiteq.store.tables import Row, Table, Tables

__all__ = ["RecoveredHalves", "clean_row", "recover_halves"]

META_CLEAN: Final = b"half-clean"
"""Two numbers, and their CRC-32: no row of HALF has a transaction that a row of DECISIONS before the first one
decided; and no handle below the second one is given again."""
SCAN_BYTES: Final = 8 << 20
END: Final = b"\xff" * 9


class RecoveredHalves(NamedTuple):
    """What was found. checks: (slots, when to ask first in ms since 1970) of rows; damaged: rows in quarantine."""

    halves: Halves
    checks: list[tuple[array[int], int]]
    damaged: int


def clean_row(halves: Halves) -> Row:
    """Return the row that tells how far the decided transactions are out of HALF."""
    numbers = b"%d %d" % (halves.clean_below, halves.next_handle)
    return (Table.META, META_CLEAN, b"%b %d" % (numbers, crc32(numbers)))


def _clean_numbers(value: bytes | None) -> tuple[int, int]:
    """Return the numbers of that row. When it is damaged all decisions are looked at: slower, and as right."""
    numbers, _, crc = (value or b"").rpartition(b" ")
    if crc != b"%d" % crc32(numbers):
        return 1, 1
    clean_below, next_handle = map(int, numbers.split())
    return clean_below, next_handle


def recover_halves(tables: Tables, rows: list[Row]) -> RecoveredHalves:
    """Read the rows of transactions; add to `rows` what a crash left to be removed."""
    halves = Halves()
    checks: list[tuple[array[int], int]] = []
    decided = _decided(tables, halves)
    parts: dict[int, list[int]] = {}
    damaged = 0
    checked = _Checks(tables)
    start = b""
    while page := tables.scan(Table.HALF, start, END, bytes_max=SCAN_BYTES):
        for key, value in page:
            row = COUNTER_KEY.unpack(key)[0]
            try:
                head = parse_half_head(key, value)
            except KiteQError:
                damaged += 1
                rows += [(Table.QUARANTINE, key, value), (Table.HALF, key, None)]
                halves.next_handle = max(halves.next_handle, row + len(value))
                continue
            halves.next_handle = max(halves.next_handle, row + 1, head.handles[-1] + 1)
            if head.enlisted:
                parts.setdefault(head.handles[0], []).append(row)
                continue
            ids, handles = first_ids(value, head), list(head.handles)
            if decided and not decided.isdisjoint(handles):
                left = [(one, handle) for one, handle in zip(ids, handles, strict=True) if handle not in decided]
                if not left:
                    rows.append((Table.HALF, key, None))
                    continue
                ids, handles = [one for one, _ in left], [handle for _, handle in left]
                halves.touched[row] = None
            slots = halves.restore(
                ids, handles, row, group=head.group, instance=head.instance, prepared_ms=head.prepared_ms
            )
            _restore_checks(halves, slots, checked, head.prepared_ms + head.check_ms, checks)
        start = page[-1][0] + b"\0"
    _restore_parts(halves, parts, decided, tables, rows)
    return RecoveredHalves(halves, checks, damaged)


def _decided(tables: Tables, halves: Halves) -> set[int]:
    """Return the handles that may still stand in a row of HALF though they were decided."""
    clean, next_handle = _clean_numbers(tables.get(Table.META, META_CLEAN))
    decided: set[int] = set()
    number = clean - 1
    start = COUNTER_KEY.pack(clean)
    while page := tables.scan(Table.DECISIONS, start, END, bytes_max=SCAN_BYTES):
        for key, value in page:
            number = COUNTER_KEY.unpack(key)[0]
            try:
                row = parse_decisions(key, value)
            except KiteQError:
                continue  # those transactions are asked about again
            decided.update(one.handle for one in row.decisions)
        start = page[-1][0] + b"\0"
    halves.clean_below = clean
    halves.next_decision = number + 1
    halves.next_handle = max(next_handle, max(decided, default=0) + 1)
    return decided


class _Checks:
    """The rows of the checks, read beside the transactions: their handles rise, and there may be a million rows."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._rows: dict[int, bytes] = {}
        self._below = 0

    def of(self, handle: int) -> bytes | None:
        """Return the row of a transaction; those are asked for in the order of their handles."""
        if handle >= self._below:
            page = self._tables.scan(Table.CHECKS, COUNTER_KEY.pack(handle), END, bytes_max=SCAN_BYTES)
            self._rows = {COUNTER_KEY.unpack(key)[0]: value for key, value in page}
            self._below = max(self._rows) + 1 if page else 1 << 64
        return self._rows.get(handle)


def _restore_checks(
    halves: Halves,
    slots: list[int],
    checked: _Checks,
    first_ms: int,
    checks: list[tuple[array[int], int]],
) -> None:
    never_asked = array("I")
    for slot in slots:
        value = checked.of(halves.handle[slot])
        if value is None:
            never_asked.append(slot)
            continue
        state = parse_checks(value)
        halves.asks[slot] = min(state.asks, 255)
        halves.unknowns[slot] = min(state.unknowns, 255)
        if state.parked_ms:
            halves.park(slot)
        checks.append((array("I", [slot]), state.next_ms or first_ms))
    if never_asked and checks and checks[-1][1] == first_ms and not halves.asks[checks[-1][0][0]]:
        checks[-1][0].extend(never_asked)
    elif never_asked:
        checks.append((never_asked, first_ms))


def _restore_parts(
    halves: Halves, parts: dict[int, list[int]], decided: set[int], tables: Tables, rows: list[Row]
) -> None:
    """Join messages that were added later to their transactions; those of decided ones go.

    The others belong to a row that is damaged, and are put into quarantine as that is.
    """
    if not parts:
        return
    undecided = {halves.handle[slot] for slot in halves.slots() if halves.state[slot] != State.FREE}
    for handle, part_rows in parts.items():
        if handle in undecided:
            halves.parts[handle] = part_rows
            continue
        for key in map(COUNTER_KEY.pack, part_rows):
            if handle not in decided:
                rows.append((Table.QUARANTINE, key, tables.get(Table.HALF, key)))
            rows.append((Table.HALF, key, None))
