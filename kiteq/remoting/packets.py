"""The packets of the wire protocol: what each frame says, and the checks it must pass.

`doc/protocol.md` describes them byte by byte. A packet is a msgpack array `[type, request, fields...]`;
fields a peer sends beyond those known here are ignored, so that later versions can add some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from kiteq.errors import RemoteProtocolError
from kiteq.remoting import shapes

__all__ = [
    "PROTOCOL",
    "WIRE_VERSION",
    "WIRE_VERSIONS",
    "Ack",
    "Admin",
    "AdminReply",
    "Ask",
    "Brokers",
    "Credit",
    "Decide",
    "Decided",
    "Deliver",
    "Enlist",
    "Extend",
    "Goodbye",
    "Hello",
    "Nack",
    "Packet",
    "Ping",
    "Pong",
    "Prepare",
    "Prepared",
    "Publish",
    "Receipts",
    "Refusal",
    "Settled",
    "Subscribe",
    "Subscribed",
    "Unsubscribe",
    "Welcome",
    "agreed_version",
    "parse_packet",
]

PROTOCOL: Final = "kiteq"
WIRE_VERSIONS: Final = (1, 2)
"""What this code speaks. Version 2 has the packet `Brokers`, which must not be sent to a peer that chose 1."""
WIRE_VERSION: Final = WIRE_VERSIONS[-1]

NACK_FAILED: Final = 0
NACK_REJECTED: Final = 1
NACK_UNSTARTED: Final = 2

RECEIPT_DUPLICATE: Final = "duplicate"
RECEIPT_DELAYED: Final = "delayed"

DECISION_ROLLBACK: Final = 0
DECISION_COMMIT: Final = 1
DECISION_UNKNOWN: Final = 2
DECISION_RUNNING: Final = 3


class Hello(NamedTuple):
    """Client to broker, first of all.

    versions: wire versions the client speaks. instance: 16 random bytes of this client instance.
    topics: what it will publish. bindings: `[topic, kind, pattern, watermark or nil, persistent, start]`
    each. warm_up: seconds until the full window is used. concurrency: handlers that run at a time.
    """

    request: int
    protocol: str
    versions: list[int]
    instance: bytes
    group: str
    topics: list[str]
    bindings: list[list[Any]]
    warm_up: int
    concurrency: int


class Welcome(NamedTuple):
    """Broker to client: accepted, and every binding is durable.

    version: the wire version from now on. limits: bounds of this broker by name. admin: whether
    every administrative verb is allowed, not only those that read figures.
    """

    request: int
    version: int
    broker: str
    limits: dict[str, int]
    admin: bool


class Refusal(NamedTuple):
    """Either way: the request with this id is refused; 0 means the connection, which is then closed."""

    request: int
    code: str
    reason: str
    temporary: bool


class Ping(NamedTuple):
    """Either way: are you there?"""

    request: int


class Pong(NamedTuple):
    """Either way: the answer to a ping."""

    request: int


class Goodbye(NamedTuple):
    """Either way: the sender will not start anything more.

    From a client it gives its unacked messages back, all but those already acked or nacked. From a
    broker: the client should send to another one and let this connection end.
    """

    request: int
    reason: str


class Brokers(NamedTuple):
    """Broker to client, since version 2: every broker of its set, itself included, after a Welcome and at each change.

    addresses: HOST:PORT each, or ":PORT" for the host that the client has connected to. A client connects
    to all of them, and no longer to those that are left out. Brokers found in a list or through ZooKeeper
    do not send it. The request id is 0.
    """

    request: int
    addresses: list[str]


class Publish(NamedTuple):
    """Client to broker: encoded messages, answered by one `Receipts`."""

    request: int
    messages: list[bytes]


class Receipts(NamedTuple):
    """Broker to client: what became of a `Publish`.

    groups: how many groups each message was routed to: one int for all, or a list in order.
    durable: on disk before this answer. exceptions: `[index, code, reason, temporary]` for each
    message that was refused. Two codes are no refusals: "duplicate", it was there already, and "delayed",
    it is stored and routed when it is due.
    """

    request: int
    groups: int | list[int]
    durable: bool
    exceptions: list[list[Any]]


class Subscribe(NamedTuple):
    """Client to broker: bindings of this client's group, as in `Hello`; answered by `Subscribed`."""

    request: int
    bindings: list[list[Any]]


class Subscribed(NamedTuple):
    """Broker to client: the change of bindings is durable and in force."""

    request: int


class Unsubscribe(NamedTuple):
    """Client to broker: remove one binding of this client's group; answered by `Subscribed`."""

    request: int
    topic: str
    kind: int
    pattern: str


class Credit(NamedTuple):
    """Client to broker: hold at most `window` unacked messages here from now on; 0 stops deliveries."""

    request: int
    window: int


class Deliver(NamedTuple):
    """Broker to client: messages with the tags `first_tag`, `first_tag + 1`, ...

    attempts: which attempt this is, one int for all, or a list in order.
    """

    request: int
    first_tag: int
    attempts: int | list[int]
    messages: list[bytes]


class Ack(NamedTuple):
    """Client to broker: `[first, last, first, last, ...]` tags done; answered by `Settled`."""

    request: int
    ranges: list[int]


class Nack(NamedTuple):
    """Client to broker: `[tag, how, after_ms or nil, error]` each; answered by `Settled`.

    how: 0 failed, 1 rejected (straight to the dead letters), 2 handed back unstarted.
    """

    request: int
    items: list[list[Any]]


class Settled(NamedTuple):
    """Broker to client: an `Ack` or `Nack` is durable; `stale` ranges had no effect."""

    request: int
    stale: list[int]


class Extend(NamedTuple):
    """Client to broker: ranges of tags it still works on, in order; no answer."""

    request: int
    ranges: list[int]


class Prepare(NamedTuple):
    """Client to broker: messages to be stored and delivered to nobody until decided; answered by `Prepared`.

    sizes: how many messages each transaction has, one int for all, or a list in order. A transaction's id
    is the id of its first message. check_after_ms: until the broker first asks about them; 0: its default.
    """

    request: int
    messages: list[bytes]
    sizes: int | list[int]
    check_after_ms: int


class Prepared(NamedTuple):
    """Broker to client: transactions are durable and undecided.

    handles: of the first one, when they rise by one, or a list in order (0 for one that was refused).
    exceptions: as in `Receipts`, but the index counts transactions.
    """

    request: int
    handles: int | list[int]
    exceptions: list[list[Any]]


class Enlist(NamedTuple):
    """Client to broker: more messages of an undecided transaction; answered by `Prepared`.

    token: 16 bytes transaction id, and 8 bytes handle if known.
    """

    request: int
    token: bytes
    messages: list[bytes]


class Decide(NamedTuple):
    """Client to broker: what becomes of transactions; answered by `Decided`.

    decision: one of DECISION_...; unknown and running are answers to `Ask`. tokens: as in `Enlist`.
    """

    request: int
    decision: int
    tokens: list[bytes]


class Decided(NamedTuple):
    """Broker to client: a `Decide` is durable, but for `exceptions`, which are as in `Receipts`."""

    request: int
    exceptions: list[list[Any]]


class Ask(NamedTuple):
    """Broker to client: what became of these transactions? Answered by `Decide`, in any grouping.

    attempts: how often it was asked about each, one int for all, or a list in order. messages: the
    first one of each transaction.
    """

    request: int
    attempts: int | list[int]
    tokens: list[bytes]
    messages: list[bytes]


class Admin(NamedTuple):
    """Client to broker: an administrative request; answered by `AdminReply`."""

    request: int
    verb: str
    arguments: dict[str, Any]


class AdminReply(NamedTuple):
    """Broker to client: the result of an administrative request."""

    request: int
    result: Any


Packet = (
    Hello | Welcome | Refusal | Ping | Pong | Goodbye | Brokers | Publish | Receipts | Subscribe | Subscribed
    | Unsubscribe | Credit | Deliver | Ack | Nack | Settled | Extend | Prepare | Prepared | Enlist | Decide
    | Decided | Ask | Admin | AdminReply
)  # fmt: skip


Check = Callable[[object], bool]

SHAPES: Final[dict[int, tuple[type[Any], tuple[Check, ...]]]] = {
    1: (
        Hello,
        (
            shapes.is_text,
            shapes.is_ints,
            shapes.is_instance,
            shapes.is_text,
            shapes.is_texts,
            shapes.is_bindings,
            shapes.is_u32,
            shapes.is_u32,
        ),
    ),
    2: (Welcome, (shapes.is_u32, shapes.is_text, shapes.is_limits, shapes.is_bool)),
    3: (Refusal, (shapes.is_text, shapes.is_text, shapes.is_bool)),
    4: (Ping, ()),
    5: (Pong, ()),
    6: (Goodbye, (shapes.is_text,)),
    # 7 to 9 are reserved for authentication
    10: (Brokers, (shapes.is_texts,)),
    16: (Publish, (shapes.is_blobs,)),
    17: (Receipts, (shapes.is_int_or_ints, shapes.is_bool, shapes.is_exceptions)),
    18: (Subscribe, (shapes.is_bindings,)),
    19: (Subscribed, ()),
    20: (Unsubscribe, (shapes.is_text, shapes.is_u32, shapes.is_text)),
    24: (Credit, (shapes.is_window,)),
    25: (Deliver, (shapes.is_tag, shapes.is_int_or_ints, shapes.is_blobs)),
    26: (Ack, (shapes.is_ranges,)),
    27: (Nack, (shapes.is_nacks,)),
    28: (Settled, (shapes.is_ranges,)),
    29: (Extend, (shapes.is_rising_ranges,)),
    32: (Prepare, (shapes.is_blobs, shapes.is_int_or_ints, shapes.is_u32)),
    33: (Prepared, (shapes.is_handle_or_handles, shapes.is_exceptions)),
    34: (Enlist, (shapes.is_token, shapes.is_blobs)),
    35: (Decide, (shapes.is_answer, shapes.is_tokens)),
    36: (Decided, (shapes.is_exceptions,)),
    37: (Ask, (shapes.is_int_or_ints, shapes.is_tokens, shapes.is_blobs)),
    48: (Admin, (shapes.is_text, shapes.is_arguments)),
    49: (AdminReply, (shapes.is_plain,)),
}
TYPE_NUMBERS: Final[dict[type[Any], int]] = {shape[0]: number for number, shape in SHAPES.items()}


def agreed_version(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the newest version that both speak, None if there is none."""
    return max(set(ours) & set(theirs), default=None)


def parse_packet(fields: object) -> Packet:
    """Return the packet of a decoded frame. Raises `RemoteProtocolError`."""
    if type(fields) is not list or len(fields) < 2:
        raise RemoteProtocolError("a frame is not a list of at least a type and a request id")
    number, request = fields[0], fields[1]
    if type(number) is not int or (shape := SHAPES.get(number)) is None:
        raise RemoteProtocolError(f"unknown packet type {shapes.shown(number)}")
    if not shapes.is_u32(request):
        raise RemoteProtocolError(f"the request id {shapes.shown(request)} is not a 32-bit number")
    packet, checks = shape
    wanted = len(checks)
    values = fields[2 : 2 + wanted]
    if len(values) < wanted:
        raise RemoteProtocolError(f"{packet.__name__} has {len(values)} fields, not {wanted}")
    for name, check, value in zip(packet._fields[1:], checks, values, strict=True):
        if not check(value):
            raise RemoteProtocolError(f"{packet.__name__}.{name} is not valid: {shapes.shown(value)}")
    return packet(request, *values)  # type: ignore[no-any-return]
