"""A store whose rows outlive it, so that a test can open it again as after a crash."""

from __future__ import annotations

from kiteq.binding.bindings import fanout
from kiteq.errors import StoreError
from kiteq.message import Message
from kiteq.store.memory import MemoryTables
from kiteq.store.state import Subscription, TopicLog
from kiteq.store.store import Store
from kiteq.store.tables import Row, Table
from kiteq.store.writer import Append, NewRecord, Submission

EXPIRES_MS = 1 << 45


class KeptTables(MemoryTables):
    """Memory tables that can fail on demand."""

    def __init__(self, bytes_max: int = 64 << 20) -> None:
        super().__init__(bytes_max)
        self.failures: list[Exception] = []
        self.applied: list[list[Row]] = []

    def apply(self, rows: list[Row]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        super().apply(rows)
        self.applied.append(rows)

    def keys(self, table: Table) -> list[bytes]:
        return [key for key, _ in self.scan(table, b"", b"\xff" * 32)]

    def close(self) -> None:
        """Keep the rows."""


class OpenStore:
    """A store driven without threads: `commit` is one commit of all that was submitted."""

    def __init__(self, tables: KeptTables) -> None:
        self.tables = tables
        self.store = Store(tables)
        self.store.writer._completed = self._finish
        self.outcomes: list[StoreError | None] = []

    def _finish(
        self, commit: int, submissions: list[Submission], new_records: list[NewRecord], error: StoreError | None
    ) -> None:
        self.store._finish(commit, submissions, new_records, error)

    def submission(self) -> Submission:
        return Submission(self.outcomes.append)

    def commit(self, *more: Submission) -> None:
        for one in more:
            self.store.writer.submit(one)
        batch: list[Submission] = []
        self.store.writer._drain(batch)
        if batch:
            self.store.writer._write(batch)

    def subscribe(self, group: str, topic: TopicLog) -> Subscription:
        subscription = self.store.new_subscription(group, topic)
        subscription.bindings = (fanout(topic.name),)
        self.store.subscriptions[subscription.number] = subscription
        submission = self.submission()
        self.store.save_subscription(subscription, submission)
        self.commit(submission)
        return subscription

    def publish(
        self, topic: TopicLog, count: int, *owners: Subscription, size: int = 10, into: Submission | None = None
    ) -> list[bytes]:
        """Append messages as the pipeline does; committed at once unless they go `into` a submission."""
        submission = into or self.submission()
        self.store.save_topic(topic, submission)
        blobs = [Message(topic.name, "pay", b"x" * size).encoded() for _ in range(count)]
        runs = [(count, tuple(one.number for one in owners))]
        table = Table.LOG if owners else Table.UNROUTED
        submission.appends.append(Append(table, topic.number, topic.next_sequence, blobs, runs, 5, EXPIRES_MS))
        submission.messages += count
        topic.next_sequence += count
        for one in owners:
            one.pending += count
            one.pending_bytes += sum(map(len, blobs))
        if into is None:
            self.commit(submission)
        return blobs

    def settle(self, subscription: Subscription, first: int, last: int) -> None:
        submission = self.submission()
        self.store.settle(subscription, range(first, last + 1), first, 0, submission)
        self.commit(submission)

    def again(self) -> OpenStore:
        """Open what is committed, as after a crash."""
        return OpenStore(self.tables)


def owed(store: Store, subscription: Subscription) -> list[int]:
    """Return the sequences a subscription is still owed, as a reader of its log finds them."""
    loaded = store.read_log(subscription, 0, 1 << 62, 1 << 30, 0)
    return [sequence for one in loaded for sequence in one.sequences if sequence not in subscription.cursor]
