r"""Rows of transactions: the half messages of one read, the decisions taken together, the checks of one.

A row of the table HALF; its key is the handle of its first transaction:

    offset  bytes  content (integers are big-endian)
    0       4      CRC-32 over the row's key and the head from offset 4 on
    4       4      length of the head
    8       8      prepared at, ms since 1970
    16      4      ms from there to the first check
    20      16     client instance that prepared
    36      1      flags: 1 = these messages were added to a transaction that is in another row
    37      1      g, length of the group's name
    38      4      n, number of transactions
    42      4      m, number of messages
    46      g      producer group
    ...     8n     handle of each transaction
    ...     4n     how many messages each has
    ...     4m     end of each message, from the start of the body
    ...     4m     CRC-32 of each message, as it ends the message
    head    ...    body: the messages, one after the other

A row of DECISIONS; its key is a counter:

    0       4      CRC-32 over the row's key and all that follows
    4       8      decided at, ms since 1970
    12      4      t, length of the text
    16      t      text: msgpack [group, who decided, reason or nil]
    ...     25 each: u64 handle, 16 bytes transaction id, u8: 0 rollback, 1 commit, plus 128 when it was asked about
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple
from zlib import crc32

import msgpack

from kiteq.errors import KiteQError
from kiteq.message import CRC_RESIDUE

__all__ = [
    "COUNTER_KEY",
    "CheckState",
    "Decision",
    "DecisionRow",
    "HalfHead",
    "decided_ids",
    "find_decision",
    "first_ids",
    "messages_of",
    "pack_checks",
    "pack_decisions",
    "pack_half",
    "parse_checks",
    "parse_decisions",
    "parse_half_head",
]

COUNTER_KEY: Final = struct.Struct(">Q")
ENLISTED: Final = 1
ASKED: Final = 128
_HEAD = struct.Struct(">IIQI16sBBII")
_AFTER_CRC = struct.Struct(">IQI16sBBII")
_DECISION = struct.Struct(">Q16sB")
_DECISIONS = struct.Struct(">IQI")


class HalfHead(NamedTuple):
    """What is known of a row without its messages. `check_ms`: from `prepared_ms` to the first check."""

    size: int
    prepared_ms: int
    check_ms: int
    instance: bytes
    enlisted: bool
    group: str
    handles: tuple[int, ...]
    sizes: tuple[int, ...]
    ends: tuple[int, ...]
    crcs_at: int


class Decision(NamedTuple):
    """What became of one transaction."""

    handle: int
    transaction_id: bytes
    committed: bool
    asked: bool


class DecisionRow(NamedTuple):
    """Decisions that were taken together."""

    at_ms: int
    group: str
    by: str
    reason: str | None
    decisions: list[Decision]


class CheckState(NamedTuple):
    """How far the checks of one transaction are.

    history: `[asked ms, client, answer, answered ms]` each, the last ones. parked_ms: 0 while it is not parked.
    """

    asks: int
    unknowns: int
    next_ms: int
    parked_ms: int
    history: list[list[object]]


def pack_half(
    key: bytes,
    group: str,
    instance: bytes,
    prepared_ms: int,
    check_ms: int,
    handles: Sequence[int],
    sizes: Sequence[int],
    blobs: Sequence[bytes],
    *,
    enlisted: bool = False,
) -> bytes:
    """Return the value of a row of HALF."""
    name = group.encode()
    count, messages = len(handles), len(blobs)
    numbers = struct.pack(f">{count}Q{count}I{messages}I", *handles, *sizes, *accumulate(map(len, blobs)))
    crcs = b"".join([blob[-4:] for blob in blobs])
    size = _HEAD.size + len(name) + len(numbers) + len(crcs)
    flags = ENLISTED if enlisted else 0
    fixed = _AFTER_CRC.pack(size, prepared_ms, check_ms, instance, flags, len(name), count, messages)
    head = b"".join((fixed, name, numbers, crcs))
    return b"".join((crc32(head, crc32(key)).to_bytes(4, "big"), head, *blobs))


def parse_half_head(key: bytes, value: bytes) -> HalfHead:
    """Check and decode the head of a row of HALF. Raises `KiteQError` when it is damaged."""
    if len(value) < _HEAD.size:
        raise KiteQError(f"a row of half messages of {len(value)} bytes")
    crc, size, prepared_ms, check_ms, instance, flags, name_size, count, messages = _HEAD.unpack_from(value)
    if not _HEAD.size <= size <= len(value) or crc32(value[4:size], crc32(key)) != crc:
        raise KiteQError("the checksum of a row of half messages does not match")
    numbers_at = _HEAD.size + name_size
    numbers = struct.unpack_from(f">{count}Q{count}I{messages}I", value, numbers_at)
    return HalfHead(
        size,
        prepared_ms,
        check_ms,
        instance,
        bool(flags & ENLISTED),
        value[_HEAD.size : numbers_at].decode(),
        numbers[:count],
        numbers[count : 2 * count],
        numbers[2 * count :],
        numbers_at + 12 * count + 4 * messages,
    )


def messages_of(value: bytes, head: HalfHead, start: int, stop: int) -> list[bytes | None]:
    """Return messages start..stop of a row; None for one that is damaged."""
    size, at = head.size, head.ends[start - 1] if start else 0
    blobs: list[bytes | None] = []
    for index in range(start, stop):
        end = head.ends[index]
        blob = value[size + at : size + end]
        crc_at = head.crcs_at + 4 * index
        good = crc32(blob) == CRC_RESIDUE and blob[-4:] == value[crc_at : crc_at + 4]
        blobs.append(blob if good else None)
        at = end
    return blobs


def first_ids(value: bytes, head: HalfHead) -> list[bytes]:
    """Return the id of each transaction of a row: that of its first message."""
    starts = (0, *head.ends)
    firsts = accumulate((0, *head.sizes[:-1]))
    return [value[head.size + starts[first] : head.size + starts[first] + 16] for first in firsts]


def pack_decisions(
    key: bytes, at_ms: int, group: str, by: str, reason: str | None, decisions: Sequence[tuple[int, bytes, bool, bool]]
) -> bytes:
    """Return the value of a row of DECISIONS; `decisions` hold the fields of `Decision`."""
    text = msgpack.packb([group, by, reason])
    pack = _DECISION.pack
    packed = [pack(handle, id_, committed | (ASKED if asked else 0)) for handle, id_, committed, asked in decisions]
    content = b"".join((_DECISIONS.pack(0, at_ms, len(text))[4:], text, *packed))
    return crc32(content, crc32(key)).to_bytes(4, "big") + content


def parse_decisions(key: bytes, value: bytes) -> DecisionRow:
    """Return a row of DECISIONS. Raises `KiteQError` when it is damaged."""
    if len(value) < _DECISIONS.size or crc32(value[4:], crc32(key)) != int.from_bytes(value[:4], "big"):
        raise KiteQError("the checksum of a row of decisions does not match")
    _, at_ms, text_size = _DECISIONS.unpack_from(value)
    entries_at = _DECISIONS.size + text_size
    group, by, reason = msgpack.unpackb(value[_DECISIONS.size : entries_at])
    decisions = [
        Decision(handle, id_, bool(how & 1), bool(how & ASKED))
        for handle, id_, how in _DECISION.iter_unpack(value[entries_at:])
    ]
    return DecisionRow(at_ms, group, by, reason, decisions)


def decided_ids(value: bytes) -> list[bytes]:
    """Return the transaction ids in a row of DECISIONS, which may be damaged."""
    first = _DECISIONS.size + int.from_bytes(value[12:16], "big") + 8
    return [value[at : at + 16] for at in range(first, len(value), _DECISION.size)]


def find_decision(
    key: bytes, value: bytes, transaction_id: bytes, group: str | None = None
) -> tuple[DecisionRow, Decision] | None:
    """Return the row, and the decision in it, of a transaction of a group; None when it is not in this row.

    The bytes are searched before they are decoded: of a million rows at most one holds an id.
    """
    if transaction_id not in value:
        return None
    try:
        row = parse_decisions(key, value)
    except KiteQError:
        return None  # nobody can be told what a damaged row said; the messages themselves are elsewhere
    if group not in (None, row.group):
        return None
    return next(((row, one) for one in row.decisions if one.transaction_id == transaction_id), None)


def pack_checks(state: CheckState) -> bytes:
    """Return the value of a row of CHECKS: a CRC-32, then the state in msgpack."""
    packed: bytes = msgpack.packb(list(state))
    return crc32(packed).to_bytes(4, "big") + packed


def parse_checks(value: bytes | None) -> CheckState:
    """Return a row of CHECKS; there is none before the first question, and a damaged one counts as none."""
    if value is None or crc32(value[4:]) != int.from_bytes(value[:4], "big") or len(value) <= 4:
        return CheckState(0, 0, 0, 0, [])
    return CheckState(*msgpack.unpackb(value[4:]))
