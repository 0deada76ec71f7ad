"""What becomes of messages a consumer held: done, tried again, or dead."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING

from kiteq.errors import KiteQError
from kiteq.limits import ERROR_LENGTH_MAX, HISTORY_MAX
from kiteq.message import Head, parse_head, split
from kiteq.pipe.failures import wait_seconds
from kiteq.pipe.leases import Chunk, Lease, Origin

if TYPE_CHECKING:
    from kiteq.clock import Clock
    from kiteq.pipe.outlet import Outlet
    from kiteq.pipe.turn import Turn
    from kiteq.store.store import Store

__all__ = ["Settlement"]


class Settlement:
    """Turns outcomes of deliveries into changes of the store, within the turn's submission."""

    def __init__(self, store: Store, clock: Clock, turn: Turn, counters: Counter[str]) -> None:
        self._store = store
        self._clock = clock
        self._turn = turn
        self._counters = counters

    def done(self, lease: Lease, start: int, stop: int) -> None:
        """Messages start..stop of a lease, just taken from it, were handled."""
        outlet, chunk = lease.outlet, lease.chunk
        self._counters["acked"] += stop - start
        outlet.leased -= stop - start
        outlet.acked += stop - start
        if chunk.origin is Origin.LOG and not self._store.forgets:
            size = lease.size if stop - start == len(lease.blobs) else sum(map(len, lease.blobs[start:stop]))
            self._settle(outlet, chunk.part(start, stop), size)
        elif chunk.origin is Origin.RETRY:
            self._store.forget_retry(outlet.subscription, chunk.sequences[0], lease.size, self._turn.settling())
        self._turn.outlets[outlet] = None

    def _settle(self, outlet: Outlet, chunk: Chunk, size: int) -> None:
        if outlet.subscription.number in self._store.subscriptions:
            self._store.settle(outlet.subscription, chunk.sequences, chunk.low, size, self._turn.settling())

    def hand_back(self, lease: Lease, start: int, stop: int) -> None:
        """Messages start..stop of a lease, just taken from it, go to somebody else; no attempt was used."""
        outlet = lease.outlet
        outlet.leased -= stop - start
        if self._is_forgotten(lease):
            outlet.dropped += stop - start
        else:
            outlet.put_back(lease.chunk.part(start, stop))
        self._turn.outlets[outlet] = None

    def failed(self, lease: Lease, index: int, error: str, after_ms: int | None) -> None:
        """An attempt at one message of a lease, just taken from it, has failed."""
        outlet = lease.outlet
        chunk = self._one(lease, index, error)
        self._counters["failed"] += 1
        if chunk is None:
            return
        head = head_of(chunk.blobs[0])
        if head is None or chunk.failures >= head.deliver_limit:
            self._bury(outlet, chunk, "delivery limit")
            return
        wait_ms = int(wait_seconds(chunk.failures) * 1000) if after_ms is None else after_ms
        if not wait_ms:
            outlet.put_back(chunk)
            return
        expires_ms = chunk.accepted_ms + head.ttl_ms
        due_ms = min(self._clock.epoch_ms() + wait_ms, expires_ms)  # then it is found, and buried
        due: list[object] = [due_ms, chunk.failures, expires_ms, chunk.history, chunk.accepted_ms]
        submission, sequence = self._turn.settling(), chunk.sequences[0]
        if chunk.origin is Origin.LOG:
            self._store.save_retry(outlet.subscription, sequence, chunk.blobs[0], due, submission)
            self._settle(outlet, chunk, len(chunk.blobs[0]))
        else:
            self._store.save_retry(outlet.subscription, sequence, None, due, submission)
        heapq.heappush(outlet.due, (due_ms, sequence))

    def rejected(self, lease: Lease, index: int, error: str) -> None:
        """A consumer will never be able to handle one message of a lease, just taken from it."""
        chunk = self._one(lease, index, error)
        self._counters["rejected"] += 1
        if chunk is not None:
            self._bury(lease.outlet, chunk, "rejected")

    def expired(self, outlet: Outlet, chunk: Chunk) -> None:
        """The messages of a chunk were not taken in time; they are neither ready nor held."""
        self._counters["expired"] += len(chunk.blobs)
        for index in range(len(chunk.blobs)):
            self._bury(outlet, chunk.part(index, index + 1), "expired")

    def damaged(self, outlet: Outlet, sequence: int, low: int) -> None:
        """A message's bytes do not match its checksum, so nobody is given them."""
        self._counters["damaged"] += 1
        outlet.damaged += 1
        self._settle(outlet, Chunk(range(sequence, sequence + 1), low, [b""], 0, 0), 0)

    def _is_forgotten(self, lease: Lease) -> bool:
        """Return whether messages were given up when they were handed out: no attempt follows."""
        origin = lease.chunk.origin
        return origin is Origin.FLY or (origin is Origin.LOG and self._store.forgets)

    def _one(self, lease: Lease, index: int, error: str) -> Chunk | None:
        """Return one message of a lease with its failure noted; None for what is never tried again."""
        outlet = lease.outlet
        outlet.leased -= 1
        self._turn.outlets[outlet] = None
        if self._is_forgotten(lease):
            outlet.dropped += 1
            return None
        chunk = lease.chunk.part(index, index + 1)
        if chunk is lease.chunk:
            chunk = Chunk(chunk.sequences, chunk.low, chunk.blobs, chunk.accepted_ms, chunk.expires_ms, chunk.origin)
        chunk.failures = lease.chunk.failures + 1
        failure: list[object] = [self._clock.epoch_ms(), lease.peer.name, error[:ERROR_LENGTH_MAX]]
        chunk.history = [*lease.chunk.history, failure][-HISTORY_MAX:]
        return chunk

    def _bury(self, outlet: Outlet, chunk: Chunk, reason: str) -> None:
        """Move one message to the dead letters, in the same transaction that settles it."""
        blob, submission = chunk.blobs[0], self._turn.settling()
        self._counters["dead"] += 1
        self._store.save_dead(
            outlet.subscription, self._clock.epoch_ms(), reason, chunk.failures, chunk.history, blob, submission
        )
        if chunk.origin is Origin.RETRY:
            self._store.forget_retry(outlet.subscription, chunk.sequences[0], len(blob), submission)
        else:
            self._settle(outlet, chunk, len(blob))


_heads: dict[bytes, Head] = {}
_HEADS_MAX = 10_000


def head_of(blob: bytes) -> Head | None:
    """Return the decoded head of a stored message, None when it cannot be decoded."""
    try:
        head_bytes = split(blob)[0]
        head = _heads.get(head_bytes)
        if head is None:
            head = parse_head(head_bytes)
            if len(_heads) >= _HEADS_MAX:
                _heads.clear()
            _heads[head_bytes] = head
    except KiteQError:
        return None
    return head
