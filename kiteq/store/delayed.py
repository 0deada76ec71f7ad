"""Messages that wait for their time: a row for those of one batch that are due in the same millisecond.

    key     8 bytes  when they are due, ms since 1970
            8 bytes  number of the first of them; the next ones follow, and no number is given twice
    value   1 byte   g, length of the name of the group that sent them
            g bytes  its name
            ...      a record as in the log, owed to nobody

So the first row is due first, and rows of one millisecond keep the order in which they were written.
The record's checksum covers the name and the key.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from kiteq.limits import RECORD_BYTES_MAX
from kiteq.store import records
from kiteq.store.records import DamagedRecord
from kiteq.store.tables import Row, Table, Tables

__all__ = [
    "KEYS_END",
    "Due",
    "Found",
    "Pending",
    "RowSize",
    "Taken",
    "build_rows",
    "due_ms_of",
    "find",
    "first_due",
    "number_of",
    "read_due",
    "read_row",
    "size_of",
    "sizes",
    "without",
]

_KEY: Final = struct.Struct(">QQ")
KEYS_END: Final = b"\xff" * (_KEY.size + 1)
"""Behind every key."""


class Pending(NamedTuple):
    """A row as read: who sent its good messages, and whether others of it are damaged."""

    group: str
    blobs: list[bytes]
    accepted_ms: int
    damaged: bool


class Due(NamedTuple):
    """Rows that are due, in order, and when the next one is; None: there is none."""

    rows: list[tuple[bytes, bytes]]
    next_ms: int | None


class Found(NamedTuple):
    """Keys of rows that may hold a message, and where to go on looking; None: that was the end."""

    keys: list[bytes]
    after: bytes | None


class Taken(NamedTuple):
    """The rows that take messages out of a row, how many there are, and how many bytes less are kept."""

    rows: list[Row]
    messages: int
    size: int


class RowSize(NamedTuple):
    """One row: its key, the number of its messages and the bytes of its value."""

    key: bytes
    messages: int
    size: int


def build_rows(group: str, by_due: Mapping[int, list[bytes]], first_number: int, now_ms: int) -> list[Row]:
    """Return the rows of messages by the ms since 1970 when they are due; they are numbered from `first_number` on.

    A row of more than a record's size is split. now_ms: when they were accepted.
    """
    rows: list[Row] = []
    number = first_number
    for due_ms, blobs in by_due.items():
        for part in _parts(blobs):
            key = _KEY.pack(due_ms, number)
            rows.append((Table.DELAYED, key, _value(group, key, part, now_ms)))
            number += len(part)
    return rows


def _parts(blobs: list[bytes]) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for blob in blobs:
        if part and size + len(blob) > RECORD_BYTES_MAX:
            yield part
            part, size = [], 0
        part.append(blob)
        size += len(blob)
    yield part


def _value(group: str, key: bytes, blobs: list[bytes], accepted_ms: int) -> bytes:
    name = group.encode()
    prefix = len(name).to_bytes(1, "big") + name
    return prefix + records.build(prefix + key, blobs, [(len(blobs), ())], accepted_ms, 0)


def due_ms_of(key: bytes) -> int:
    """Return when a row is due, ms since 1970."""
    return int.from_bytes(key[:8], "big")


def number_of(key: bytes) -> int:
    """Return the number of the first message of a row."""
    return int.from_bytes(key[8:], "big")


def read_row(key: bytes, value: bytes) -> Pending:
    """Return a row. Raises `DamagedRecord` when not even its head can be trusted."""
    prefix, record_bytes = _split(value)
    record = records.read(prefix + key, record_bytes)
    return Pending(prefix[1:].decode(), record.blobs, record.accepted_ms, bool(record.damaged))


def _split(value: bytes) -> tuple[bytes, bytes]:
    start = 1 + int.from_bytes(value[:1], "big")
    return value[:start], value[start:]


def without(key: bytes, value: bytes, message_id: bytes, group: str | None) -> Taken:
    """Return what takes a message, if it is of `group` or that is None, out of a row.

    Damaged messages of it go to quarantine, with the row as it was. Raises `DamagedRecord`.
    """
    pending = read_row(key, value)
    kept = [blob for blob in pending.blobs if blob[:16] != message_id]
    taken = len(pending.blobs) - len(kept)
    if not taken or group not in (None, pending.group):
        return Taken([], 0, 0)
    rows: list[Row] = [(Table.QUARANTINE, key, value)] if pending.damaged else []
    left = _value(pending.group, key, kept, pending.accepted_ms) if kept else None
    rows.append((Table.DELAYED, key, left))
    return Taken(rows, taken, len(value) - len(left or b""))


def first_due(tables: Tables) -> int | None:
    """Return when the first row is due, ms since 1970."""
    rows = tables.scan(Table.DELAYED, b"", KEYS_END, bytes_max=1)
    return due_ms_of(rows[0][0]) if rows else None


def read_due(tables: Tables, now_ms: int, bytes_max: int) -> Due:
    """Return rows that are due at `now_ms`, up to the one that reaches `bytes_max`."""
    later = _KEY.pack(now_ms + 1, 0)
    rows = tables.scan(Table.DELAYED, b"", later, bytes_max=bytes_max)
    if sum(len(value) for _, value in rows) >= bytes_max:
        return Due(rows, now_ms)  # there may be more
    following = tables.scan(Table.DELAYED, later, KEYS_END, bytes_max=1)
    return Due(rows, due_ms_of(following[0][0]) if following else None)


def find(tables: Tables, message_id: bytes, after: bytes, bytes_max: int) -> Found:
    """Return which rows behind the key `after` hold these 16 bytes, looking at about `bytes_max`."""
    rows = tables.scan(Table.DELAYED, after + b"\0" if after else b"", KEYS_END, bytes_max=bytes_max)
    return Found([key for key, value in rows if message_id in value], rows[-1][0] if rows else None)


def size_of(key: bytes, value: bytes) -> RowSize:
    """Return the size of a row; one whose head is damaged counts as no message."""
    prefix, record_bytes = _split(value)
    try:
        messages = records.parse_head(prefix + key, record_bytes).messages
    except DamagedRecord:
        messages = 0
    return RowSize(key, messages, len(value))


def sizes(tables: Tables, after: bytes, bytes_max: int) -> list[RowSize]:
    """Return the sizes of the rows behind the key `after`, looking at about `bytes_max`."""
    rows = tables.scan(Table.DELAYED, after + b"\0" if after else b"", KEYS_END, bytes_max=bytes_max)
    return [size_of(key, value) for key, value in rows]
