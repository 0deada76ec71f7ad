"""What a storage engine must offer: ordered tables of bytes, changed in atomic, durable steps.

Everything kiteq keeps is rows in these tables; layout and meaning of keys and values belong to
`kiteq.store` and are the same for every engine. `tests/store/test_tables.py` is the contract.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

__all__ = ["PREFIX", "SEQUENCE_KEY", "Row", "Table", "Tables", "Usage"]

SEQUENCE_KEY: Final = struct.Struct(">IQ")
"""(topic or subscription number, sequence): byte order is numeric order."""
PREFIX: Final = struct.Struct(">I")


class Table(IntEnum):
    """The tables; a number never changes its meaning."""

    META = 0
    """Format version, broker id, epoch, topics, subscriptions, the snapshot of cursors."""
    LOG = 1
    """(topic, first sequence) -> record: what one commit brought to the topic."""
    SETTLED = 2
    """commit -> everything settled in that commit."""
    UNROUTED = 3
    """(topic, first sequence) -> record of messages no group was bound to."""
    RECENT = 4
    """commit -> ids and body CRCs of what it accepted, for the duplicate window."""
    RETRY = 5
    """(subscription, sequence) -> message waiting for another attempt."""
    DUE = 6
    """(subscription, sequence) -> when, and what happened so far."""
    DEAD = 7
    """(subscription, time, id, count) -> message nobody will be given again, and why."""
    QUARANTINE = 8
    """(topic, first sequence) -> bytes whose checksum does not match."""
    HALF = 9
    """first handle -> transactions that one read brought, undecided when written."""
    DECISIONS = 10
    """counter -> transactions that were decided together: how, when and by whom."""
    CHECKS = 11
    """handle -> how often a transaction was asked about, when next, and the answers."""
    AUDIT = 12
    """(time, counter) -> a decision by hand: whose, and why."""
    DELAYED = 13
    """(due, counter) -> messages that become deliverable then."""


Row = tuple[Table, bytes, bytes | None]
"""(table, key, value): put, or delete when the value is None."""


class Usage(NamedTuple):
    """How full the engine is, in bytes."""

    used: int
    limit: int
    disk_free: int
    disk_size: int


class Tables(Protocol):
    """A storage engine. `apply` is called by one thread only; the others by any thread."""

    def apply(self, rows: list[Row]) -> None:
        """Write rows in order, all or none, and return when they are durable.

        Raises `StoreFull` (nothing was written, the engine goes on) or `StoreFailed` (fail-stop).
        """

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the value of a key."""

    def scan(
        self, table: Table, start: bytes, end: bytes, *, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Return rows with start <= key < end in order, stopping after the row that reaches `bytes_max`."""

    def usage(self) -> Usage:
        """Return how full the engine is."""

    def close(self) -> None:
        """Release the engine; it must not be used afterwards."""
