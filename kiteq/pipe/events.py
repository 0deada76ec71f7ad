"""Facts about batches: what flows from handler to handler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kiteq.message import FLAG_FLY
from kiteq.remoting.packets import (
    Ack,
    Admin,
    Credit,
    Decide,
    Enlist,
    Extend,
    Goodbye,
    Nack,
    Packet,
    Prepare,
    Publish,
    Subscribe,
    Unsubscribe,
)

if TYPE_CHECKING:
    from kiteq.errors import StoreError
    from kiteq.message import Head
    from kiteq.pipe.delays import Saved
    from kiteq.pipe.outlet import Outlet
    from kiteq.pipe.peer import Peer
    from kiteq.store.state import TopicLog
    from kiteq.store.tables import Row

__all__ = [
    "Accepted",
    "AdminAsked",
    "Admitted",
    "Batch",
    "BindingsSent",
    "Checked",
    "CreditGranted",
    "Deciding",
    "Departed",
    "Frame",
    "HalfFrame",
    "HalvesAdmitted",
    "HalvesChecked",
    "HalvesSent",
    "Kind",
    "NotStored",
    "PacketsRead",
    "Placed",
    "Published",
    "Routed",
    "Settling",
    "Stored",
    "Trusted",
]


@dataclass(slots=True)
class PacketsRead:
    """One socket read brought these packets."""

    peer: Peer
    packets: list[Packet]


@dataclass(slots=True)
class Trusted:
    """Packets of a connection whose greeting was accepted."""

    peer: Peer
    packets: list[Packet]


@dataclass(slots=True)
class Admitted:
    """Messages the broker has room for."""

    peer: Peer
    packets: list[Publish]


@dataclass(slots=True)
class Published:
    """A producer sent messages."""

    peer: Peer
    packets: list[Publish]


class Kind:
    """What messages with the same head have in common, decoded once.

    prefix: length and bytes of the head, and the empty extras: a message that has exactly these bytes
    at HEAD_OFFSET is of this kind. outlets: who it is routed to while the bindings stay as they are.
    """

    __slots__ = ("head", "is_fly", "outlets", "owners", "prefix", "topic")

    def __init__(self, prefix: bytes, head: Head, topic: TopicLog) -> None:
        self.prefix = prefix
        self.head = head
        self.topic = topic
        self.is_fly = head.flags & FLAG_FLY != 0
        self.outlets: tuple[Outlet, ...] | None = None
        self.owners: tuple[int, ...] = ()


class Frame:
    """One publish frame on its way: what to answer, and which of its messages go on.

    runs: (kind, messages) of neighbours of one kind. exceptions: as in `packets.Receipts`.
    repeated: positions of messages accepted before; answered when what was before is durable.
    routed: (messages, groups, fly) for each run, once the groups are fixed.
    """

    __slots__ = ("crcs", "exceptions", "ids", "repeated", "request", "routed", "runs", "total")

    def __init__(self, request: int, total: int) -> None:
        self.request = request
        self.total = total
        self.runs: list[tuple[Kind, list[bytes]]] = []
        self.routed: list[tuple[int, int, bool]] = []
        self.exceptions: list[list[Any]] = []
        self.repeated: list[tuple[int, bytes]] = []
        self.ids: list[bytes] = []
        self.crcs: list[bytes] = []


@dataclass(slots=True)
class Batch:
    """Messages that are accepted together: the publish frames of one read, or what became deliverable otherwise.

    peer: who sent it; None for messages that were stored before, as half or delayed ones.
    rows: changes of the store that belong in the same transaction. done: called when that is durable, or was
    refused, in place of receipts. delayed: messages of it that wait for their time.
    moves: the rows free what the messages take, so that only a store without any room refuses it.
    """

    peer: Peer | None
    frames: list[Frame]
    size: int
    rows: list[Row] = field(default_factory=list)
    done: Callable[[StoreError | None], None] | None = None
    delayed: Saved | None = None
    moves: bool = False


class HalfFrame:
    """One prepare or enlist frame on its way: which of its transactions may be stored.

    token: of the transaction that the messages are added to; None for new ones. Of those that may be
    stored: ids, places (index in the frame), sizes (messages of each), blobs; and of all their messages
    message_ids and crcs, for the duplicate window. repeated: (index, id) of transactions prepared before.
    exceptions: as in `packets.Prepared`.
    """

    __slots__ = (
        "blobs", "check_after_ms", "crcs", "exceptions", "ids", "message_ids", "places", "repeated", "request",
        "sizes", "token", "total",
    )  # fmt: skip

    def __init__(self, request: int, total: int, check_after_ms: int, token: bytes | None) -> None:
        self.request = request
        self.total = total
        self.check_after_ms = check_after_ms
        self.token = token
        self.ids: list[bytes] = []
        self.places: list[int] = []
        self.sizes: list[int] = []
        self.blobs: list[bytes] = []
        self.message_ids: list[bytes] = []
        self.crcs: list[bytes] = []
        self.repeated: list[tuple[int, bytes]] = []
        self.exceptions: list[list[Any]] = []


@dataclass(slots=True)
class HalvesSent:
    """A producer sent messages that are not to be delivered until it decides."""

    peer: Peer
    packets: list[Prepare | Enlist]


@dataclass(slots=True)
class HalvesAdmitted:
    """Half messages the broker has room for."""

    peer: Peer
    packets: list[Prepare | Enlist]


@dataclass(slots=True)
class HalvesChecked:
    """What may be stored of half messages was told from what may not."""

    peer: Peer
    frames: list[HalfFrame]


@dataclass(slots=True)
class Deciding:
    """A client tells what became of transactions."""

    peer: Peer
    packets: list[Decide]


@dataclass(slots=True)
class Checked:
    """What may be accepted of a batch was told from what may not."""

    batch: Batch


class Placed:
    """Neighbouring messages of one kind with the outlets they are routed to; no outlets: kept apart."""

    __slots__ = ("blobs", "expires_ms", "first", "fly", "kind", "outlets", "owners", "topic")

    def __init__(self, kind: Kind, outlets: tuple[Outlet, ...], blobs: list[bytes], expires_ms: int) -> None:
        self.kind = kind
        self.topic = kind.topic
        self.outlets = outlets
        self.owners = kind.owners
        self.blobs = blobs
        self.expires_ms = expires_ms
        self.fly = kind.is_fly
        self.first = 0


@dataclass(slots=True)
class Routed:
    """The groups of each message are fixed."""

    batch: Batch
    placed: list[Placed]
    accepted_ms: int


@dataclass(slots=True)
class Accepted:
    """A routed batch was handed to the store; with `--flush async` that is enough for a receipt."""

    batch: Batch


@dataclass(slots=True)
class Stored:
    """A routed batch is durable (or was only fly messages)."""

    batch: Batch
    placed: list[Placed]
    accepted_ms: int
    durable: bool


@dataclass(slots=True)
class NotStored:
    """The store had no room for a batch."""

    batch: Batch
    error: StoreError


@dataclass(slots=True)
class Settling:
    """A consumer tells what became of messages it holds."""

    peer: Peer
    acks: list[Ack]
    nacks: list[Nack]
    extensions: list[Extend]


@dataclass(slots=True)
class CreditGranted:
    """A consumer states its window."""

    peer: Peer
    packet: Credit


@dataclass(slots=True)
class BindingsSent:
    """A client adds or removes bindings of its group."""

    peer: Peer
    packet: Subscribe | Unsubscribe


@dataclass(slots=True)
class AdminAsked:
    """An administrative request."""

    peer: Peer
    packet: Admin


@dataclass(slots=True)
class Departed:
    """A client said goodbye."""

    peer: Peer
    packet: Goodbye
