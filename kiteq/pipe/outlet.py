"""Messages of one subscription on their way out: what waits in memory, and from where the log is read on."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from itertools import accumulate, zip_longest
from typing import TYPE_CHECKING

from kiteq.binding.matching import Matcher
from kiteq.limits import FLY_QUEUE_MAX, READY_BYTES_MAX, RETRY_BYTES_MAX, RETRY_ROWS_MAX
from kiteq.pipe.leases import Chunk, Origin

if TYPE_CHECKING:
    from kiteq.pipe.groups import Group
    from kiteq.store.state import Subscription

__all__ = ["Outlet"]

BURST_SECONDS = 0.2
"""How much of a watermark may be used at once after a pause: two turns of the timer that wakes it."""
DELIVER_BYTES_MAX = 1 << 20
"""One deliver frame is cut at this size, unless a single message is larger."""
JOINED_SPAN_MS = 100
"""Neighbours accepted this close may become one chunk; the later time counts, so that nothing expires early."""
CHUNK_MESSAGES_MAX = 1_024
"""A chunk in memory grows to this by joining its neighbours."""


class Outlet:
    """The delivering side of a subscription.

    position: all below it is in memory, was handed out, or is not owed. behind: the log holds more
    from there on that must be read.
    """

    __slots__ = (
        "_allowance", "_allowance_at", "acked", "behind", "closed", "damaged", "dropped", "due", "fly", "group",
        "leased", "matchers",
        "position", "reading", "ready", "ready_bytes", "reading_retries", "replaying", "subscription",
    )  # fmt: skip

    def __init__(self, subscription: Subscription, group: Group) -> None:
        self.subscription = subscription
        self.group = group
        self.matchers: tuple[Matcher, ...] = ()
        self.ready: deque[Chunk] = deque()
        self.ready_bytes = 0
        self.fly: deque[bytes] = deque()
        self.position = subscription.cursor.floor
        self.behind = subscription.pending > 0
        self.closed = False
        """The group has left the topic: nothing more goes out."""
        self.reading = False
        self.reading_retries = False
        self.due: list[tuple[int, int]] = []
        """A heap of (due ms, sequence) of what waits for another attempt."""
        self.replaying: list[tuple[int, int]] = []
        """What joins `due` once it is durable."""
        self.leased = 0
        self.acked = 0
        """Since the start of the broker."""
        self.dropped = 0
        self.damaged = 0
        self._allowance = 1.0
        self._allowance_at = 0.0

    def matches(self, message_type: str) -> bool:
        """Return whether a binding of the subscription takes messages of this type."""
        return any(matcher.matches(message_type) for matcher in self.matchers)

    @property
    def retries_full(self) -> bool:
        """Whether so many messages wait for another attempt that first deliveries pause."""
        subscription = self.subscription
        return subscription.retrying >= RETRY_ROWS_MAX or subscription.retrying_bytes >= RETRY_BYTES_MAX

    def add_new(self, chunk: Chunk) -> None:
        """Take messages that just became deliverable; leave them in the log when too many wait already."""
        if self.behind:
            return
        if self.ready_bytes > READY_BYTES_MAX or not self.group.consuming or self.retries_full:
            self.behind = True
            return
        chunk.low = self.position
        self.position = chunk.sequences[-1] + 1
        self.append(chunk)

    def append(self, chunk: Chunk) -> None:
        """Take messages that go out after all others, joined with their neighbours where that may be."""
        self.ready_bytes += sum(map(len, chunk.blobs))
        last = self.ready[-1] if self.ready else None
        if (
            last is not None
            and len(last.blobs) + len(chunk.blobs) <= CHUNK_MESSAGES_MAX
            and type(last.sequences) is range
            and type(chunk.sequences) is range
            and last.sequences.stop == chunk.sequences.start
            and chunk.accepted_ms - last.since_ms <= JOINED_SPAN_MS
            and not last.failures
            and last.origin is chunk.origin is Origin.LOG
        ):
            joined = Chunk(
                range(last.sequences.start, chunk.sequences.stop), last.low, last.blobs + chunk.blobs,
                chunk.accepted_ms, min(last.expires_ms, chunk.expires_ms),
            )  # fmt: skip
            joined.since_ms = last.since_ms
            self.ready[-1] = joined
        else:
            self.ready.append(chunk)

    def put_back(self, chunk: Chunk) -> None:
        """Take messages that nobody holds any more; they go out before all others."""
        self.ready.appendleft(chunk)
        self.ready_bytes += sum(map(len, chunk.blobs))

    def take(self, count: int) -> Chunk:
        """Return the next messages, up to `count`, all of one chunk, that fit a frame; something must be ready."""
        chunk = self.ready.popleft()
        size = sum(map(len, chunk.blobs))
        if size > DELIVER_BYTES_MAX:
            fitting = bisect_right(list(accumulate(map(len, chunk.blobs))), DELIVER_BYTES_MAX)
            count = min(count, max(1, fitting))
        if len(chunk.blobs) > count:
            self.ready.appendleft(chunk.part(count, len(chunk.blobs)))
            chunk = chunk.part(0, count)
            size = sum(map(len, chunk.blobs))
        self.ready_bytes -= size
        return chunk

    def add_fly(self, blobs: list[bytes]) -> int:
        """Take fly messages while there is room and somebody to take them; return how many were dropped."""
        room = FLY_QUEUE_MAX - len(self.fly) if self.group.consuming else 0
        self.fly.extend(blobs[:room])
        dropped = max(0, len(blobs) - room)
        self.dropped += dropped
        return dropped

    def forget_untouched(self) -> None:
        """Give up memory nobody will need soon: what never failed is read from the log again."""
        if not self.leased:
            # What was handed back stands before older messages, so the order of `ready` says nothing here:
            # everything from `position` on is read again, hence only what no kept message lies behind may go.
            latest_first = sorted(
                (chunk for chunk in self.ready if chunk.origin is Origin.LOG),
                key=lambda chunk: chunk.sequences[-1],
                reverse=True,
            )
            forgotten: set[Chunk] = set()
            for chunk, earlier in zip_longest(latest_first, latest_first[1:]):
                if chunk.failures or (earlier is not None and earlier.sequences[-1] >= chunk.sequences[0]):
                    break
                forgotten.add(chunk)
                self.position = chunk.low  # the gap before it is settled with it
                self.ready_bytes -= sum(map(len, chunk.blobs))
                self.behind = True
            self.ready = deque(chunk for chunk in self.ready if chunk not in forgotten)
        self.dropped += len(self.fly)
        self.fly.clear()

    # --- watermark ----------------------------------------------------------------------------

    def allowance(self, now: float) -> int:
        """Return how many messages the watermark lets go out now."""
        rate = self.subscription.watermark
        if rate is None:
            return 1 << 31
        burst = max(1.0, rate * BURST_SECONDS)
        self._allowance = min(burst, self._allowance + (now - self._allowance_at) * rate)
        self._allowance_at = now
        return int(self._allowance)

    def use_allowance(self, count: int) -> None:
        """Note that messages went out."""
        if self.subscription.watermark is not None:
            self._allowance -= count
