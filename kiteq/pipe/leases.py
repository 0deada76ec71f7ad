"""Messages on their way: waiting in memory for a consumer (chunk), or held by one (lease)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kiteq.pipe.outlet import Outlet
    from kiteq.pipe.peer import Peer

__all__ = ["Chunk", "Lease", "Origin", "retry_chunk"]


class Origin(IntEnum):
    """Where a message comes from, so what settling it means."""

    LOG = 0
    RETRY = 1
    FLY = 2


class Chunk:
    """Neighbouring messages of one subscription, in order, waiting for a consumer.

    sequences: ascending; a range where dense. low: the gap before the first that is not owed begins
    here. failures: of each message so far, with `history` a `[ms, client, error]` for each failure;
    messages that failed travel alone.
    """

    __slots__ = ("accepted_ms", "blobs", "expires_ms", "failures", "history", "low", "origin", "sequences", "since_ms")

    def __init__(
        self,
        sequences: Sequence[int],
        low: int,
        blobs: list[bytes],
        accepted_ms: int,
        expires_ms: int,
        origin: Origin = Origin.LOG,
    ) -> None:
        self.sequences = sequences
        self.low = low
        self.blobs = blobs
        self.accepted_ms = accepted_ms
        self.expires_ms = expires_ms
        self.origin = origin
        self.since_ms = accepted_ms
        """When the first of neighbours that were joined was accepted; `accepted_ms` is of the last."""
        self.failures = 0
        self.history: list[list[object]] = []

    def part(self, start: int, stop: int) -> Chunk:
        """Return messages start..stop of it as a chunk of their own."""
        if start == 0 and stop == len(self.blobs):
            return self
        low = self.low if start == 0 else self.sequences[start - 1] + 1
        part = Chunk(
            self.sequences[start:stop], low, self.blobs[start:stop], self.accepted_ms, self.expires_ms, self.origin
        )
        part.failures, part.history, part.since_ms = self.failures, self.history, self.since_ms
        return part


def retry_chunk(sequence: int, blob: bytes, due: list[Any]) -> Chunk:
    """Return a message that waited for another attempt, from its rows in the store."""
    _, failures, expires_ms, history, accepted_ms = due
    chunk = Chunk(range(sequence, sequence + 1), sequence, [blob], accepted_ms, expires_ms, Origin.RETRY)
    chunk.failures, chunk.history = failures, history
    return chunk


class Lease:
    """A chunk handed to one connection, until every message of it is acked, nacked or taken back.

    first_tag: the delivery tag of its first message: the fencing token, never used again on that
    connection. deadline, hold_until: monotonic seconds.
    """

    __slots__ = ("blobs", "chunk", "deadline", "done", "first_tag", "hold_until", "open", "outlet", "peer", "size")

    def __init__(self, peer: Peer, outlet: Outlet, chunk: Chunk, deadline: float, hold_until: float) -> None:
        self.peer = peer
        self.outlet = outlet
        self.chunk = chunk
        self.blobs = chunk.blobs
        self.size = sum(map(len, chunk.blobs))
        self.first_tag = peer.next_tag
        self.deadline = deadline
        self.hold_until = hold_until
        self.open = len(chunk.blobs)
        self.done: bytearray | None = None
        """Which messages are settled, once some but not all are."""

    def take(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Mark messages start..stop as no longer held; return the runs of them that were."""
        if not self.open:
            return []
        total = len(self.blobs)
        if self.done is None:
            if start == 0 and stop == total:
                self.peer.in_flight -= self.open
                self.open = 0
                return [(0, total)]
            self.done = bytearray(total)
        done = self.done
        runs: list[tuple[int, int]] = []
        position = start
        while position < stop:
            begin = done.find(0, position, stop)
            if begin < 0:
                break
            end = done.find(1, begin, stop)
            end = stop if end < 0 else end
            done[begin:end] = b"\1" * (end - begin)
            runs.append((begin, end))
            self.open -= end - begin
            self.peer.in_flight -= end - begin
            position = end
        return runs
