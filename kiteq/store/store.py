"""The message store: what is on disk, what is known of it in memory, and the way between them.

All methods but the `read_...` ones are called on the event loop and change memory at once; the disk
follows through the writer, in the order of submission. What may be told to a client is told from the
`done` callback of a submission, never before.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import msgpack
import trio

from kiteq.binding.bindings import to_wire
from kiteq.errors import StoreError, StoreFailed
from kiteq.store import records
from kiteq.store.recovery import (
    META_NUMBERS,
    META_SNAPSHOT,
    Recovered,
    recover,
    subscription_key,
    subscription_value,
    topic_key,
)
from kiteq.store.state import DeadLetter, Loaded, Subscription, TopicLog
from kiteq.store.tables import PREFIX, SEQUENCE_KEY, Table, Tables, Usage
from kiteq.store.writer import NewRecord, Submission, Writer

__all__ = ["Store"]

PAGE_BYTES = 1 << 20
"""Dead letters are read in pages of this, so that memory does not grow with their number."""


class Store:
    """A store that was opened; `running` starts its writer.

    tables: where it is kept, for modules that have a table of their own; only the writer changes them.
    durable: whether what is committed survives the process.
    forgets: what is delivered counts as settled (`mock://`).
    """

    def __init__(self, tables: Tables, *, durable: bool = True, forgets: bool = False) -> None:
        self.tables = tables
        self.durable = durable
        self.forgets = forgets
        self._recovered = recovered = recover(tables)
        self.broker_id = recovered.broker_id
        self.epoch = recovered.epoch
        self.topics = recovered.topics
        self.subscriptions = recovered.subscriptions
        self.halves = recovered.halves.halves
        self._next_number = recovered.next_number
        self._topics_by_number = {topic.number: topic for topic in self.topics.values()}
        self._token: trio.lowlevel.TrioToken | None = None
        self._unsaved_settlements = False
        self._dead_count = 0
        self.failure: StoreFailed | None = None
        self.failed = trio.Event()
        self.last_commit = recovered.next_commit - 1
        """The last commit the loop has heard of."""
        self.damaged_records = recovered.damaged
        self.after_commit: Callable[[], None] = lambda: None
        """Called on the loop after the callbacks of each commit."""
        self.writer = Writer(
            tables, self._committed, first_commit=recovered.next_commit, settled_commits=recovered.settled_commits
        )
        self.writer.recent_rows_from(recovered.recent_from)

    def take_recovered(self) -> Recovered:
        """Return what was found at the start; it is forgotten here, for it may be large."""
        recovered = self._recovered
        self._recovered = recovered._replace(recent=[], due=[], halves=recovered.halves._replace(checks=[]))
        return recovered

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the writer thread; leaving commits all that was submitted and closes the tables."""
        self._token = trio.lowlevel.current_trio_token()
        thread = threading.Thread(target=self.writer.run, name="kiteq-writer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                if self.failure is None:
                    self.submit_snapshot()
                self.writer.stop()
                await trio.to_thread.run_sync(thread.join)
                await trio.lowlevel.checkpoint()  # lets the last commits' callbacks run
                self.tables.close()

    def _committed(
        self, commit: int, submissions: list[Submission], new_records: list[NewRecord], error: StoreError | None
    ) -> None:
        """Hand a commit's outcome to the loop; called in the writer thread."""
        assert self._token is not None
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._finish, commit, submissions, new_records, error)

    def _finish(
        self, commit: int, submissions: list[Submission], new_records: list[NewRecord], error: StoreError | None
    ) -> None:
        self.last_commit = commit
        if isinstance(error, StoreFailed):
            self.failure = error
            self.failed.set()
            return  # no answer is true any more
        for record in new_records:
            self._topics_by_number[record.topic].index.append(record.first, record.owed, record.owed, record.expires_ms)
        for one in submissions:
            for append in one.appends:
                if append.table is Table.LOG:
                    topic = self._topics_by_number[append.topic]
                    topic.committed = max(topic.committed, append.first + len(append.blobs))
        for one in submissions:
            one.done(error)
        self.after_commit()

    async def write(self, submission: Submission) -> StoreError | None:
        """Submit; return when it is durable (None), or why it was not written. Takes the place of its `done`."""
        outcome: list[StoreError | None] = []
        finished = trio.Event()

        def done(error: StoreError | None) -> None:
            outcome.append(error)
            finished.set()

        submission.done = done
        self.writer.submit(submission)
        await finished.wait()
        return outcome[0]

    async def all_durable(self) -> None:
        """Return when all that was submitted so far is durable, or was refused."""
        await self.write(Submission())

    # --- names ---------------------------------------------------------------------------------

    def topic(self, name: str) -> TopicLog:
        """Return a topic, made when new; its row is written by the first submission that uses it."""
        topic = self.topics.get(name)
        if topic is None:
            topic = TopicLog(self._take_number(), name)
            self.topics[name] = self._topics_by_number[topic.number] = topic
        return topic

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def save_topic(self, topic: TopicLog, submission: Submission) -> None:
        """Add a topic's row to a submission unless an earlier one had it."""
        if not topic.stored:
            topic.stored = True
            submission.rows.append((Table.META, topic_key(topic.number), topic.name.encode()))
            submission.rows.append((Table.META, META_NUMBERS, b"%d" % self._next_number))

    def new_subscription(self, group: str, topic: TopicLog) -> Subscription:
        """Return a subscription without bindings that owns nothing yet and is not in the table."""
        return Subscription(self._take_number(), group, topic, (), topic.next_sequence)

    def save_subscription(self, subscription: Subscription, submission: Submission, *, active: bool = True) -> None:
        """Add the row of a subscription, and of its topic, to a submission."""
        topic = subscription.topic
        self.save_topic(topic, submission)
        wire = [to_wire(binding) for binding in subscription.bindings]
        value = subscription_value(subscription.group, topic.number, wire, subscription.start, active=active)
        submission.rows.append((Table.META, subscription_key(subscription.number), value))
        submission.rows.append((Table.META, META_NUMBERS, b"%d" % self._next_number))

    def drop_subscription(self, subscription: Subscription, submission: Submission) -> None:
        """Forget a subscription. Rows of its dead and retrying messages go by `read_keys`, before this."""
        self.subscriptions.pop(subscription.number, None)
        submission.rows.append((Table.META, subscription_key(subscription.number), None))

    # --- settling ------------------------------------------------------------------------------

    def settle(
        self, subscription: Subscription, sequences: Sequence[int], low: int, size: int, submission: Submission
    ) -> None:
        """Note that a subscription is done with messages of its log.

        sequences: ascending. low: first of the gap before them that it was not owed; the whole of
        low..last counts as settled, so that the cursor stays short. size: their bytes.
        """
        last = sequences[-1]
        subscription.cursor.add(low, last)
        subscription.pending -= len(sequences)
        subscription.pending_bytes = max(0, subscription.pending_bytes - size) if subscription.pending else 0
        submission.settled += (subscription.number, low, last)
        self._unsaved_settlements = True
        topic = subscription.topic
        for first in topic.index.settle(sequences):
            submission.rows.append((Table.LOG, SEQUENCE_KEY.pack(topic.number, first), None))

    def submit_snapshot(self) -> None:
        """Write all cursors whole, so that older settlements need not be kept."""
        if not self._unsaved_settlements:
            return
        self._unsaved_settlements = False
        submission = Submission(urgent=False)
        cursors = [[one.number, [one.cursor.floor, *one.cursor.ranges]] for one in self.subscriptions.values()]
        submission.rows.append((Table.META, META_SNAPSHOT, msgpack.packb(cursors)))
        submission.snapshot = True
        self.writer.submit(submission)

    # --- retries and dead letters --------------------------------------------------------------

    def save_retry(
        self,
        subscription: Subscription,
        sequence: int,
        blob: bytes | None,
        due: list[object],
        submission: Submission,
    ) -> None:
        """Write when a message is tried again; `due` is [due ms, failures, expires ms, history, accepted ms].

        blob: its bytes when it is new among the retries; None when it already is one.
        """
        key = SEQUENCE_KEY.pack(subscription.number, sequence)
        if blob is not None:
            submission.rows.append((Table.RETRY, key, blob))
            subscription.retrying += 1
            subscription.retrying_bytes += len(blob)
        submission.rows.append((Table.DUE, key, msgpack.packb(due)))

    def forget_retry(self, subscription: Subscription, sequence: int, size: int, submission: Submission) -> None:
        """Remove a message of `size` bytes from the retries: it was acked, or is dead."""
        key = SEQUENCE_KEY.pack(subscription.number, sequence)
        submission.rows.append((Table.RETRY, key, None))
        submission.rows.append((Table.DUE, key, None))
        subscription.retrying -= 1
        subscription.retrying_bytes -= size

    def save_dead(
        self,
        subscription: Subscription,
        at_ms: int,
        reason: str,
        attempts: int,
        history: list[list[object]],
        blob: bytes,
        submission: Submission,
    ) -> None:
        """Write a dead letter."""
        self._dead_count += 1  # the same id may come from two producer groups in one millisecond
        key = PREFIX.pack(subscription.number) + at_ms.to_bytes(8, "big") + blob[:16] + PREFIX.pack(self._dead_count)
        value = msgpack.packb([reason, attempts, history, blob])
        submission.rows.append((Table.DEAD, key, value))
        subscription.dead += 1
        subscription.dead_bytes += len(value)

    def forget_dead(self, subscription: Subscription, letter: DeadLetter, submission: Submission) -> None:
        """Remove a dead letter."""
        submission.rows.append((Table.DEAD, letter.key, None))
        subscription.dead -= 1
        subscription.dead_bytes -= letter.size

    # --- reading, from any thread --------------------------------------------------------------

    def read_log(
        self, subscription: Subscription, start: int, below: int, bytes_max: int, position: int
    ) -> list[Loaded]:
        """Return what the records from `start` on hold for a subscription, up to about `bytes_max`.

        Records with nothing for it are skipped but counted, so the result may be empty before the end;
        the last entry's `sequences` then is `range(n, n)`: everything below n was looked at.
        position: n is above it, unless the log ends before. The record that `start` belongs to may
        end below it and fill `bytes_max` alone; the next read would begin with that record again.
        """
        loaded = self._read_log_once(subscription, start, below, bytes_max)
        while start < (reached := loaded[-1].sequences.start) <= min(position, below - 1):  # type: ignore[attr-defined]
            start = reached
            loaded[-1:] = self._read_log_once(subscription, start, below, bytes_max)
        return loaded

    def _read_log_once(self, subscription: Subscription, start: int, below: int, bytes_max: int) -> list[Loaded]:
        topic, number = subscription.topic, subscription.number
        loaded: list[Loaded] = []
        key_end = SEQUENCE_KEY.pack(topic.number, below)
        rows = self.tables.scan(Table.LOG, SEQUENCE_KEY.pack(topic.number, start), key_end, bytes_max=bytes_max)
        reached = start
        for key, value in rows:
            reached = SEQUENCE_KEY.unpack(key)[1]
            try:
                record = records.read(key, value)
            except records.DamagedRecord:
                self.damaged_records += 1
                continue
            damaged = [sequence for sequence, owners in record.damaged if number in owners]
            reached = max([reached, *record.sequences[-1:], *(sequence for sequence, _ in record.damaged[-1:])])
            mine = [index for index, owners in enumerate(record.owners) if number in owners]
            if len(mine) == len(record.blobs):
                sequences, blobs = record.sequences, record.blobs
            else:
                sequences = [record.sequences[index] for index in mine]
                blobs = [record.blobs[index] for index in mine]
            loaded.append(Loaded(sequences, blobs, record.accepted_ms, record.expires_ms, damaged))
        complete = sum(len(value) for _, value in rows) < bytes_max
        reached = below if complete else reached + 1
        loaded.append(Loaded(range(reached, reached), [], 0, 0, []))
        return loaded

    def read_raw(self, topic: TopicLog, first: int) -> bytes | None:
        """Return the record that starts at `first`."""
        return self.tables.get(Table.LOG, SEQUENCE_KEY.pack(topic.number, first))

    def read_retries(
        self,
        subscription: Subscription,
        sequences: Sequence[int],
        *,
        expired_ms: int | None = None,
        bytes_max: int | None = None,
    ) -> list[tuple[int, bytes, list[object]]]:
        """Return (sequence, message, due row) of messages waiting for another attempt.

        expired_ms: only of those that expire until then. bytes_max: stop after the message that reaches it.
        """
        found: list[tuple[int, bytes, list[object]]] = []
        size = 0
        for sequence in sequences:
            key = SEQUENCE_KEY.pack(subscription.number, sequence)
            row = self.tables.get(Table.DUE, key)
            due = None if row is None else msgpack.unpackb(row)
            if due is None or (expired_ms is not None and due[2] > expired_ms):
                continue
            blob = self.tables.get(Table.RETRY, key)
            if blob is not None:
                found.append((sequence, blob, due))
                size += len(blob)
                if bytes_max is not None and size >= bytes_max:
                    break
        return found

    def read_dead(self, subscription: Subscription, after: bytes = b"") -> list[DeadLetter]:
        """Return a page of the dead letters of a subscription, oldest first: those behind the key `after`."""
        letters: list[DeadLetter] = []
        for key, value in self._page(Table.DEAD, subscription, after):
            reason, attempts, history, blob = msgpack.unpackb(value)
            at_ms = int.from_bytes(key[4:12], "big")
            letters.append(DeadLetter(key, at_ms, key[12:28], reason, attempts, history, blob, len(value)))
        return letters

    def read_keys(self, subscription: Subscription, table: Table, after: bytes = b"") -> list[bytes]:
        """Return a page of the keys that a subscription has in DEAD, DUE or RETRY: those behind `after`."""
        return [key for key, _ in self._page(table, subscription, after)]

    def _page(self, table: Table, subscription: Subscription, after: bytes) -> list[tuple[bytes, bytes]]:
        start = after + b"\0" if after else PREFIX.pack(subscription.number)
        return self.tables.scan(table, start, PREFIX.pack(subscription.number + 1), bytes_max=PAGE_BYTES)

    def read_unrouted(self, topic: TopicLog, start: int, bytes_max: int) -> list[tuple[bytes, records.Record | None]]:
        """Return (key, record) of what no group was bound to, from a sequence on; None for a damaged one."""
        found: list[tuple[bytes, records.Record | None]] = []
        end = PREFIX.pack(topic.number + 1)
        for key, value in self.tables.scan(
            Table.UNROUTED, SEQUENCE_KEY.pack(topic.number, start), end, bytes_max=bytes_max
        ):
            try:
                found.append((key, records.read(key, value)))
            except records.DamagedRecord:
                found.append((key, None))
        return found

    def read_unrouted_sizes(self, topic: TopicLog, start: int, bytes_max: int) -> list[tuple[bytes, int, int]]:
        """Return (key, bytes, accepted ms) of a topic's records no group was bound to, from a sequence on.

        The bytes are those of the messages, as they were counted when they were submitted.
        """
        sizes: list[tuple[bytes, int, int]] = []
        begin, end = SEQUENCE_KEY.pack(topic.number, start), PREFIX.pack(topic.number + 1)
        for key, value in self.tables.scan(Table.UNROUTED, begin, end, bytes_max=bytes_max):
            try:
                head = records.parse_head(key, value)
                sizes.append((key, len(value) - head.size, head.accepted_ms))
            except records.DamagedRecord:
                sizes.append((key, len(value), 0))  # the first to go
        return sizes

    def usage(self) -> Usage:
        """Return how full the store is."""
        return self.tables.usage()
