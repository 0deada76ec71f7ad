"""What the store knows of topics and subscriptions while it runs, and what it reads of their messages.

The rows it is rebuilt from are its truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kiteq.binding.bindings import Binding
from kiteq.store.index import RecordIndex
from kiteq.store.intervals import IntervalSet
from kiteq.store.writer import Append

__all__ = ["DeadLetter", "Loaded", "Subscription", "TopicLog", "Watcher"]


class Watcher:
    """Notes messages that no group is bound to, for a subscription that takes over what is kept.

    refused: first sequences of those whose commit was refused after they had been noted.
    """

    __slots__ = ("appends", "refused")

    def __init__(self) -> None:
        self.appends: list[Append] = []
        self.refused: set[int] = set()


class TopicLog:
    """The log of one topic.

    next_sequence: what the next accepted message gets. committed: all below it is durable and may be
    read, unless its commit failed.
    """

    __slots__ = ("committed", "index", "name", "next_sequence", "number", "stored", "watchers")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.next_sequence = 0
        self.committed = 0
        self.index = RecordIndex()
        self.watchers: dict[int, Watcher] = {}
        """By number of the subscription that takes over."""
        self.stored = False
        """Whether its row of the meta table was submitted."""


class Subscription:
    """One group in one topic: its bindings, and what it has settled.

    The number is never used again, so a group that is dropped and made again is a new one.
    Counts are messages; `pending` are those routed and not settled, without retrying ones.
    """

    __slots__ = (
        "bindings", "cursor", "dead", "dead_bytes", "group", "number", "pending", "pending_bytes", "retrying",
        "retrying_bytes", "start", "topic",
    )  # fmt: skip

    def __init__(self, number: int, group: str, topic: TopicLog, bindings: Sequence[Binding], start: int) -> None:
        self.number = number
        self.group = group
        self.topic = topic
        self.bindings = tuple(bindings)
        self.start = start
        """Where its cursor began: what its row says. Later settlements have rows of their own."""
        self.cursor = IntervalSet(start)
        self.pending = 0
        self.pending_bytes = 0
        self.retrying = 0
        self.retrying_bytes = 0
        self.dead = 0
        self.dead_bytes = 0

    @property
    def persistent(self) -> bool:
        """Whether messages wait while nobody of the group is connected."""
        return self.bindings[0].persistent

    @property
    def watermark(self) -> int | None:
        """Messages a second, at most; None for no limit."""
        return self.bindings[0].watermark

    @property
    def kept_bytes(self) -> int:
        """What the group makes the store keep in this topic, in bytes."""
        return self.pending_bytes + self.retrying_bytes + self.dead_bytes


class Loaded(NamedTuple):
    """What one record holds for one subscription."""

    sequences: Sequence[int]
    blobs: list[bytes]
    accepted_ms: int
    expires_ms: int
    damaged: list[int]


class DeadLetter(NamedTuple):
    """A message nobody of the group will be given again, and why."""

    key: bytes
    at_ms: int
    message_id: bytes
    reason: str
    attempts: int
    history: list[list[object]]
    blob: bytes
    size: int
    """Bytes of its row's value, as counted in `dead_bytes`."""
