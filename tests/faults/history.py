"""Histories: what producers and consumers saw, one JSON line an event, written outside the broker's folder.

An operation is two events, its invocation and its outcome. One without an outcome, because the
connection ended first, may have happened or not. Times are `time.monotonic()`, which all processes
of one machine share, so histories of several processes are merged by time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self
from zlib import crc32

from kiteq.message import CRC_RESIDUE

__all__ = [
    "Asked",
    "Bound",
    "BrokerStarted",
    "BrokerStopped",
    "Corrupted",
    "DecideInvoked",
    "DecideOk",
    "DecideRefused",
    "Delivered",
    "Drained",
    "Ended",
    "Event",
    "Extended",
    "FinalDead",
    "FinalGroup",
    "FinalTransaction",
    "HalfInvoked",
    "HalfOk",
    "HalfRefused",
    "History",
    "LocalOutcome",
    "Opened",
    "PublishInvoked",
    "PublishOk",
    "PublishRefused",
    "PublishUnknown",
    "Run",
    "SettleOk",
    "Settling",
    "Stalled",
    "Waiting",
    "digest_of",
    "read_histories",
]


class Run(NamedTuple):
    """How the broker was started.

    resends: producers send again by themselves, unseen, what has no answer. check_limit: answers "unknown"
    before a transaction is parked.
    """

    at: float
    ack_deadline: float
    resends: bool = False
    check_limit: int = 15


class BrokerStarted(NamedTuple):
    """The broker greets clients. broker: its id, where there are several."""

    at: float
    broker: str = ""


class BrokerStopped(NamedTuple):
    """The broker was told to end, or killed, at `began` and is gone since `at`."""

    at: float
    began: float
    how: str


class Stalled(NamedTuple):
    """From `began` on nothing passed between the broker and its clients, or one side stood still; that is over."""

    at: float
    began: float


class Corrupted(NamedTuple):
    """The test changed stored bytes of a message while the broker was down."""

    at: float
    id: str


class Opened(NamedTuple):
    """A connection was welcomed. topics: what it said it publishes."""

    at: float
    connection: str
    group: str
    topics: list[str] | None = None


class Ended(NamedTuple):
    """A connection ended. how: "goodbye" or "dropped" by this side, "lost" by the other or on the way."""

    at: float
    connection: str
    how: str


class Bound(NamedTuple):
    """Bindings `[topic, kind, pattern, persistent]` were asked for (`confirmed` False), then durable (True)."""

    at: float
    group: str
    bindings: list[list[object]]
    confirmed: bool


class PublishInvoked(NamedTuple):
    """A message was sent; `call` joins the outcome to it. `digest` covers all its bytes.

    delay: seconds before which it must not arrive, counted from here at the earliest.
    """

    at: float
    call: str
    producer: str
    id: str
    topic: str
    message_type: str
    digest: str
    deliver_limit: int
    delay: float = 0.0


class PublishOk(NamedTuple):
    """A positive receipt; groups is None when the receipt does not say. broker: who gave it, of several."""

    at: float
    call: str
    groups: int | None
    duplicate: bool
    durable: bool
    broker: str = ""


class PublishRefused(NamedTuple):
    """A definite no."""

    at: float
    call: str
    code: str


class PublishUnknown(NamedTuple):
    """The connection ended before an answer."""

    at: float
    call: str


class HalfInvoked(NamedTuple):
    """Messages `[id, topic, message type, digest, deliver limit]` were prepared in a transaction, or added to it.

    connection: that did it, "" when only the producer is known.
    """

    at: float
    transaction: str
    producer: str
    connection: str
    messages: list[list[object]]


class HalfOk(NamedTuple):
    """The broker, which of several is in `broker`, said that these messages of a transaction are durable."""

    at: float
    transaction: str
    messages: list[str]
    broker: str = ""


class HalfRefused(NamedTuple):
    """A definite no to these messages."""

    at: float
    transaction: str
    messages: list[str]
    code: str


class DecideInvoked(NamedTuple):
    """A producer decides, or answers a check: "commit", "rollback", "unknown" or "running"."""

    at: float
    call: str
    transaction: str
    producer: str
    decision: str


class DecideOk(NamedTuple):
    """The broker said that it is durable."""

    at: float
    call: str


class DecideRefused(NamedTuple):
    """A definite no."""

    at: float
    call: str
    code: str


class Asked(NamedTuple):
    """The broker asked a connection about a transaction."""

    at: float
    connection: str
    group: str
    transaction: str


class LocalOutcome(NamedTuple):
    """What the producer's own database says in the end about a transaction."""

    at: float
    transaction: str
    committed: bool


class Delivered(NamedTuple):
    """A message arrived; a digest of "damaged" means that its own checksum does not match."""

    at: float
    connection: str
    group: str
    tag: int
    id: str
    attempt: int
    digest: str


class Settling(NamedTuple):
    """how: "ack", "failed", "rejected" or "unstarted" was sent for a delivery."""

    at: float
    connection: str
    tag: int
    how: str


class SettleOk(NamedTuple):
    """The broker answered; `stale` says that it had no effect."""

    at: float
    connection: str
    tag: int
    stale: bool


class Extended(NamedTuple):
    """The consumer said that it still works on a delivery."""

    at: float
    connection: str
    tag: int


class Drained(NamedTuple):
    """Producers stopped, and consumers that ack all took what came until nothing was left or time was up."""

    at: float
    complete: bool


class FinalGroup(NamedTuple):
    """What the broker says at the end about a group and topic."""

    at: float
    group: str
    topic: str
    pending: int
    in_flight: int
    retrying: int
    dead: int


class Waiting(NamedTuple):
    """What the broker says during a run about what waits for a group in a topic."""

    at: float
    group: str
    topic: str
    messages: int


class FinalTransaction(NamedTuple):
    """A transaction that the broker lists as not decided at the end: "open" or "parked"."""

    at: float
    transaction: str
    state: str


class FinalDead(NamedTuple):
    """A dead letter at the end."""

    at: float
    group: str
    topic: str
    id: str
    message_type: str
    reason: str
    attempts: int


Event = (
    Run
    | BrokerStarted
    | BrokerStopped
    | Stalled
    | Corrupted
    | Opened
    | Ended
    | Bound
    | PublishInvoked
    | PublishOk
    | PublishRefused
    | PublishUnknown
    | HalfInvoked
    | HalfOk
    | HalfRefused
    | DecideInvoked
    | DecideOk
    | DecideRefused
    | Asked
    | LocalOutcome
    | Delivered
    | Settling
    | SettleOk
    | Extended
    | Drained
    | Waiting
    | FinalGroup
    | FinalTransaction
    | FinalDead
)

_KINDS: Final[dict[str, type[Event]]] = {kind.__name__: kind for kind in Event.__args__}


def digest_of(blob: bytes) -> str:
    """Return what a history keeps of a message's bytes."""
    return sha256(blob).hexdigest()[:16] if crc32(blob) == CRC_RESIDUE else "damaged"


class History:
    """An append-only file of events; `with History(path) as history: history.write(event)`.

    mortal: the writing process may be killed, so each event leaves it at once.
    """

    def __init__(self, path: Path, *, mortal: bool = False) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1 if mortal else -1)

    def write(self, *events: Event) -> None:
        """Append events in order."""
        self._file.writelines(json.dumps([type(event).__name__, *event]) + "\n" for event in events)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _read(path: Path) -> Iterator[Event]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            kind, *fields = json.loads(line)
            yield _KINDS[kind](*fields)


def read_histories(paths: Iterable[Path]) -> list[Event]:
    """Return the events of all files in the order of their times; equal times keep their file's order."""
    return sorted((event for path in paths for event in _read(path)), key=lambda event: event.at)
