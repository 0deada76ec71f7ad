r"""The log record: the messages one commit brought to a topic, with the groups they are owed to.

    offset  bytes  content (integers are big-endian)
    0       4      CRC-32 over the row's key and the head from offset 4 on
    4       4      length of the head
    8       4      n, number of messages
    12      8      earliest expiry, ms since 1970
    20      8      accepted at: when they became deliverable, ms since 1970
    28      2      r, number of runs
    30      2      flags: 1 = sparse
    32      ...    r runs: u32 messages, u16 s, s times u32 subscription number
    ...     4n     end of each message, from the start of the body
    ...     4n     CRC-32 of each message, as it ends the message
    ...     4n     only if sparse: sequence of each message, from the row's first sequence
    head    ...    body: the messages, one after the other

The CRC covers the message CRCs as data: a CRC over bytes that end in their own CRC proves nothing.
So a damaged message is told from its neighbours, and a message of another record does not pass.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple
from zlib import crc32

from kiteq.errors import KiteQError
from kiteq.message import CRC_RESIDUE

__all__ = ["DamagedRecord", "Head", "Record", "Run", "build", "join_runs", "parse_head", "read", "sequences"]

SPARSE: Final = 1
_HEAD = struct.Struct(">IIIQQHH")
_AFTER_CRC = struct.Struct(">IIQQHH")
_RUN = struct.Struct(">IH")

Run = tuple[int, tuple[int, ...]]
"""(messages, subscription numbers they are owed to)"""


class DamagedRecord(KiteQError):
    """The head of a record does not match its checksum."""


class Head(NamedTuple):
    """What is known of a record without its messages."""

    size: int
    messages: int
    expires_ms: int
    accepted_ms: int
    runs: tuple[Run, ...]
    sparse: bool
    runs_end: int


class Record(NamedTuple):
    """A record as read: good messages with their sequences and owners, and how many were damaged."""

    accepted_ms: int
    expires_ms: int
    sequences: Sequence[int]
    blobs: list[bytes]
    owners: list[tuple[int, ...]]
    damaged: list[tuple[int, tuple[int, ...]]]
    """(sequence, owners) of messages that do not match their checksum."""


def join_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with neighbours of the same owners joined."""
    joined: list[Run] = []
    for messages, owners in runs:
        if joined and joined[-1][1] == owners:
            joined[-1] = (joined[-1][0] + messages, owners)
        else:
            joined.append((messages, owners))
    return joined


def build(
    key: bytes,
    blobs: list[bytes],
    runs: Sequence[Run],
    accepted_ms: int,
    expires_ms: int,
    relative: Sequence[int] | None = None,
) -> bytes:
    """Return the value of a log row. `relative` are the sequences of a sparse record, minus the first."""
    count = len(blobs)
    packed_runs = b"".join(
        _RUN.pack(messages, len(owners)) + struct.pack(f">{len(owners)}I", *owners) for messages, owners in runs
    )
    ends = struct.pack(f">{count}I", *accumulate(map(len, blobs)))
    crcs = b"".join([blob[-4:] for blob in blobs])
    sparse = b"" if relative is None else struct.pack(f">{count}I", *relative)
    size = _HEAD.size + len(packed_runs) + len(ends) + len(crcs) + len(sparse)
    fixed = _AFTER_CRC.pack(size, count, expires_ms, accepted_ms, len(runs), SPARSE if sparse else 0)
    head = b"".join((fixed, packed_runs, ends, crcs, sparse))
    return b"".join((crc32(head, crc32(key)).to_bytes(4, "big"), head, *blobs))


def parse_head(key: bytes, value: bytes) -> Head:
    """Check and decode the head of a record. Raises `DamagedRecord`."""
    if len(value) < _HEAD.size:
        raise DamagedRecord(f"a record of {len(value)} bytes")
    crc, size, count, expires_ms, accepted_ms, run_count, flags = _HEAD.unpack_from(value)
    if not _HEAD.size <= size <= len(value) or crc32(value[4:size], crc32(key)) != crc:
        raise DamagedRecord("the checksum of a record's head does not match")
    position = _HEAD.size
    runs: list[Run] = []
    for _ in range(run_count):
        messages, owners = _RUN.unpack_from(value, position)
        position += _RUN.size
        runs.append((messages, struct.unpack_from(f">{owners}I", value, position)))
        position += 4 * owners
    return Head(size, count, expires_ms, accepted_ms, tuple(runs), bool(flags & SPARSE), position)


def sequences(key: bytes, value: bytes, head: Head) -> Sequence[int]:
    """Return the sequence of each message of a record whose head was checked; its key ends with the first."""
    first = int.from_bytes(key[-8:], "big")
    if not head.sparse:
        return range(first, first + head.messages)
    relative = struct.unpack_from(f">{head.messages}I", value, head.runs_end + 8 * head.messages)
    return [first + distance for distance in relative]


def read(key: bytes, value: bytes) -> Record:
    """Return a record's good messages. Raises `DamagedRecord` when not even the head can be trusted."""
    head = parse_head(key, value)
    count = head.messages
    ends = struct.unpack_from(f">{count}I", value, head.runs_end)
    crcs_at = head.runs_end + 4 * count
    crcs = value[crcs_at : crcs_at + 4 * count]
    numbers = sequences(key, value, head)
    size = head.size
    blobs = [value[size + start : size + end] for start, end in pairwise((0, *ends))]
    owners: list[tuple[int, ...]] = []
    for messages, owed_to in head.runs:
        owners.extend([owed_to] * messages)
    damaged = [
        index
        for index, blob in enumerate(blobs)
        if crc32(blob) != CRC_RESIDUE or blob[-4:] != crcs[4 * index : 4 * index + 4]
    ]
    if not damaged:
        return Record(head.accepted_ms, head.expires_ms, numbers, blobs, owners, [])
    bad = set(damaged)
    good = [index for index in range(count) if index not in bad]
    return Record(
        head.accepted_ms,
        head.expires_ms,
        [numbers[index] for index in good],
        [blobs[index] for index in good],
        [owners[index] for index in good],
        [(numbers[index], owners[index]) for index in damaged],
    )
