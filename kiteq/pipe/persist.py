"""Hands routed messages to the store's writer; the pipeline goes on when they are durable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiteq.errors import StoreFull
from kiteq.pipe.events import Accepted, Frame, NotStored, Placed, Routed, Stored
from kiteq.store.tables import Table
from kiteq.store.writer import Append, Recent, Submission

if TYPE_CHECKING:
    from kiteq.errors import StoreError
    from kiteq.pipe.core import Core

__all__ = ["Persist"]


class Persist:
    """Gives each message its sequence, and its place in the log or among the unrouted."""

    accepts = (Routed,)
    emits = (Accepted, Stored, NotStored)

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: Routed) -> tuple[Stored | Accepted, ...]:
        """Submit a batch; nothing follows yet, unless nothing has to be durable first."""
        batch = event.batch
        stored = [placed for placed in event.placed if not placed.fly]
        repeated = any(frame.repeated for frame in batch.frames)
        if not stored and not repeated and not batch.rows and batch.delayed is None:
            return (Stored(batch, event.placed, event.accepted_ms, durable=False),)
        submission = Submission(lambda error: self._finished(event, error))
        for placed in stored:
            self._append(placed, event.accepted_ms, submission)
        submission.rows += batch.rows
        submission.moves = batch.moves
        if batch.delayed is not None:
            submission.rows += batch.delayed.rows
            submission.refusable = True
            submission.accepted_ms = event.accepted_ms
        if batch.peer is not None:
            self._note_ids(batch.peer.group, batch.frames, submission)
            batch.peer.uncommitted_bytes += batch.size
        self._core.store.writer.submit(submission)
        if self._core.settings.flush == "async" and batch.done is None:
            return (Accepted(batch),)
        return ()

    def _append(self, placed: Placed, accepted_ms: int, submission: Submission) -> None:
        topic = placed.topic
        placed.first = topic.next_sequence
        count = len(placed.blobs)
        topic.next_sequence += count
        self._core.store.save_topic(topic, submission)
        table = Table.LOG if placed.outlets else Table.UNROUTED
        runs = [(count, placed.owners)]
        append = Append(table, topic.number, placed.first, placed.blobs, runs, accepted_ms, placed.expires_ms)
        submission.appends.append(append)
        if not placed.outlets:
            self._core.unrouted_bytes += sum(map(len, placed.blobs))
            self._core.counters["unrouted"] += count
            for watcher in topic.watchers.values():
                watcher.appends.append(append)
        submission.messages += count
        if placed.outlets:
            size = sum(map(len, placed.blobs))
            for outlet in placed.outlets:
                outlet.subscription.pending += count
                outlet.subscription.pending_bytes += size

    def _note_ids(self, group: str, frames: list[Frame], submission: Submission) -> None:
        ids = b"".join([message_id for frame in frames for message_id in frame.ids])
        if ids:
            crcs = b"".join([crc for frame in frames for crc in frame.crcs])
            submission.recent.append(Recent(group, ids, crcs))
        submission.recent_floor = self._core.duplicates.floor_commit

    def _finished(self, event: Routed, error: StoreError | None) -> None:
        batch = event.batch
        if batch.peer is not None:
            batch.peer.uncommitted_bytes -= batch.size
            self._core.turn.touch_peer(batch.peer)  # its reader may wait for this
        if error is None:
            if batch.delayed is not None:
                self._core.counters["delayed"] += batch.delayed.messages
                self._core.delays.stored(batch.delayed)
            self._core.resume(Stored(batch, event.placed, event.accepted_ms, durable=True))
            return
        self._take_back(event)
        self._core.resume(NotStored(batch, error if isinstance(error, StoreFull) else StoreFull(str(error))))

    def _take_back(self, event: Routed) -> None:
        """Forget what was not stored after all."""
        if event.batch.peer is not None:
            for frame in event.batch.frames:
                self._core.duplicates.forget(event.batch.peer.group, frame.ids)
        for placed in event.placed:
            if not placed.outlets and not placed.fly:
                self._core.unrouted_bytes -= sum(map(len, placed.blobs))
                self._core.counters["unrouted"] -= len(placed.blobs)
                for watcher in placed.topic.watchers.values():
                    watcher.refused.add(placed.first)
            for outlet in placed.outlets if not placed.fly else ():
                outlet.subscription.pending -= len(placed.blobs)
                outlet.subscription.pending_bytes -= sum(map(len, placed.blobs))
