"""Gives a group that binds with start="first" what was kept because no group was bound to it.

That is copied into the log for its subscription alone, oldest first, before the binding takes part in
routing, so a new subscription sees the order of acceptance. Messages that come meanwhile are noted by a
watcher and copied in the turn in which the binding takes effect: nothing can fall between. A crash on
the way leaves an inactive row of a new subscription, which recovery drops; the client binds again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio

from kiteq.binding.bindings import Binding
from kiteq.binding.matching import Matcher
from kiteq.limits import READ_BYTES, UNROUTED_SECONDS_MAX
from kiteq.pipe.settlement import head_of
from kiteq.store.state import Watcher
from kiteq.store.tables import SEQUENCE_KEY, Table
from kiteq.store.writer import Append, Submission

if TYPE_CHECKING:
    from kiteq.errors import StoreError
    from kiteq.pipe.core import Core
    from kiteq.pipe.outlet import Outlet

__all__ = ["TakeOver"]


class TakeOver:
    """One subscription while it takes over.

    new: whether the subscription is; its bindings are then all in `bindings`.
    bindings: those that are new, or were not "first" before. older: those the group had.
    error: why something was not copied.
    """

    def __init__(
        self, core: Core, outlet: Outlet, *, new: bool, bindings: Sequence[Binding], older: Sequence[Binding]
    ) -> None:
        self.outlet = outlet
        self.new = new
        self.bindings = bindings
        self.older = older
        self.error: StoreError | None = None
        self._core = core
        self._wanted = [Matcher(binding) for binding in bindings if binding.start == "first"]
        self._had = [Matcher(binding) for binding in older if binding.start == "first"]
        self._watcher = Watcher()
        self._start = 0
        """All that was kept below this sequence has been copied."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """End the watch on leaving: when all copies are durable, and it is known which messages were refused."""
        number = self.outlet.subscription.number
        try:
            yield
        finally:
            self.outlet.subscription.topic.watchers.pop(number, None)

    async def copy_kept(self) -> None:
        """Copy what is kept; what comes meanwhile is little, and left to `copy_rest`."""
        subscription = self.outlet.subscription
        if self.new:
            submission = Submission()
            self._core.store.save_subscription(subscription, submission, active=False)
            self._core.store.writer.submit(submission)
        await self._copy_kept(cut=False)

    async def copy_rest(self) -> None:
        """Copy what came meanwhile; what comes from now on is noted, so that there is an end."""
        subscription = self.outlet.subscription
        subscription.topic.watchers[subscription.number] = self._watcher
        await self._copy_kept(cut=True)
        await self._core.store.all_durable()

    def copy_watched(self) -> None:
        """Copy what was noted since the last call."""
        appends, self._watcher.appends = self._watcher.appends, []
        for append in appends:
            self._copy(append.blobs, append.accepted_ms, append.first)

    async def _copy_kept(self, *, cut: bool) -> None:
        """Copy what has been submitted by now, from `_start` on, which is moved on.

        cut: leave out what was submitted later but came into the same record.
        """
        store, topic = self._core.store, self.outlet.subscription.topic
        end = topic.next_sequence
        await self._core.store.all_durable()
        while self._start < end and self.error is None and not self.outlet.closed:
            rows = await trio.to_thread.run_sync(partial(store.read_unrouted, topic, self._start, READ_BYTES))
            self._start = SEQUENCE_KEY.unpack(rows[-1][0])[1] + 1 if rows else end
            for _, record in rows:
                if record is not None:
                    below = bisect_left(record.sequences, end) if cut else len(record.blobs)
                    self._copy(record.blobs[:below], record.accepted_ms, None)
                    self._start = max(self._start, record.sequences[-1] + 1 if record.sequences else 0)

    def _copy(self, kept: list[bytes], accepted_ms: int, watched: int | None) -> None:
        """Copy what matches; `watched` is the first sequence of what may be refused yet."""
        now_ms = self._core.clock.epoch_ms()
        blobs: list[bytes] = []
        expires_ms = accepted_ms + int(UNROUTED_SECONDS_MAX * 1000)
        for blob in kept:
            head = head_of(blob)
            if head is None or accepted_ms + head.ttl_ms <= now_ms:
                continue
            if self._matches(head.message_type):
                blobs.append(blob)
                expires_ms = min(expires_ms, accepted_ms + head.ttl_ms)
        if not blobs or self.outlet.closed:
            return
        subscription = self.outlet.subscription
        topic = subscription.topic
        append = Append(
            Table.LOG, topic.number, topic.next_sequence, blobs, [(len(blobs), (subscription.number,))],
            accepted_ms, expires_ms,
        )  # fmt: skip
        topic.next_sequence += len(blobs)
        submission = Submission(partial(self._copied, append, watched))
        submission.appends.append(append)
        subscription.pending += len(blobs)
        subscription.pending_bytes += sum(map(len, blobs))
        self._core.store.writer.submit(submission)

    def _matches(self, message_type: str) -> bool:
        return any(one.matches(message_type) for one in self._wanted) and not any(
            one.matches(message_type) for one in self._had
        )

    def _copied(self, append: Append, watched: int | None, error: StoreError | None) -> None:
        subscription, count, size = self.outlet.subscription, len(append.blobs), sum(map(len, append.blobs))
        if error is not None:
            self.error = error
            subscription.pending -= count
            subscription.pending_bytes -= size
            return
        if watched in self._watcher.refused:  # its producer was told so, just before this
            copies = range(append.first, append.first + count)
            self._core.store.settle(subscription, copies, append.first, size, self._core.turn.settling())
        # Not earlier: a read of the log that ends before this commit would reset it.
        self.outlet.behind = True
