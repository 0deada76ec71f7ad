"""The packets of the wire protocol: what each frame says, and the checks it must pass.

`doc/protocol.md` describes them byte by byte. A packet is a msgpack array `[type, request, fields...]`;
fields a peer sends beyond those known here are ignored, so that later versions can add some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kiteq.errors import RemoteProtocolError
from kiteq.remoting.shapes import (
    is_arguments,
    is_bindings,
    is_blobs,
    is_bool,
    is_exceptions,
    is_instance,
    is_int_or_ints,
    is_ints,
    is_limits,
    is_nacks,
    is_plain,
    is_ranges,
    is_rising_ranges,
    is_tag,
    is_text,
    is_texts,
    is_u32,
    is_window,
    shown,
)

__all__ = [
    "PROTOCOL",
    "WIRE_VERSION",
    "Ack",
    "Admin",
    "AdminReply",
    "Credit",
    "Deliver",
    "Extend",
    "Goodbye",
    "Hello",
    "Nack",
    "Packet",
    "Ping",
    "Pong",
    "Publish",
    "Receipts",
    "Refusal",
    "Settled",
    "Subscribe",
    "Subscribed",
    "Unsubscribe",
    "Welcome",
    "parse_packet",
]

PROTOCOL: Final = "kiteq"
WIRE_VERSION: Final = 1

NACK_FAILED: Final = 0
NACK_REJECTED: Final = 1
NACK_UNSTARTED: Final = 2

RECEIPT_DUPLICATE: Final = "duplicate"


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
    administrative requests are allowed.
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


class Publish(NamedTuple):
    """Client to broker: encoded messages, answered by one `Receipts`."""

    request: int
    messages: list[bytes]


class Receipts(NamedTuple):
    """Broker to client: what became of a `Publish`.

    groups: how many groups each message was routed to: one int for all, or a list in order.
    durable: on disk before this answer. exceptions: `[index, code, reason, temporary]` for each
    message that was refused (code "duplicate": it was there already, which is a success).
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
    Hello
    | Welcome
    | Refusal
    | Ping
    | Pong
    | Goodbye
    | Publish
    | Receipts
    | Subscribe
    | Subscribed
    | Unsubscribe
    | Credit
    | Deliver
    | Ack
    | Nack
    | Settled
    | Extend
    | Admin
    | AdminReply
)


Check = Callable[[object], bool]

SHAPES: Final[dict[int, tuple[type[Any], tuple[Check, ...]]]] = {
    1: (Hello, (is_text, is_ints, is_instance, is_text, is_texts, is_bindings, is_u32, is_u32)),
    2: (Welcome, (is_u32, is_text, is_limits, is_bool)),
    3: (Refusal, (is_text, is_text, is_bool)),
    4: (Ping, ()),
    5: (Pong, ()),
    6: (Goodbye, (is_text,)),
    # 7 to 9 are reserved for authentication
    16: (Publish, (is_blobs,)),
    17: (Receipts, (is_int_or_ints, is_bool, is_exceptions)),
    18: (Subscribe, (is_bindings,)),
    19: (Subscribed, ()),
    20: (Unsubscribe, (is_text, is_u32, is_text)),
    24: (Credit, (is_window,)),
    25: (Deliver, (is_tag, is_int_or_ints, is_blobs)),
    26: (Ack, (is_ranges,)),
    27: (Nack, (is_nacks,)),
    28: (Settled, (is_ranges,)),
    29: (Extend, (is_rising_ranges,)),
    # 32 to 47 are reserved for transactions
    48: (Admin, (is_text, is_arguments)),
    49: (AdminReply, (is_plain,)),
}
TYPE_NUMBERS: Final[dict[type[Any], int]] = {shape[0]: number for number, shape in SHAPES.items()}


def parse_packet(fields: object) -> Packet:
    """Return the packet of a decoded frame. Raises `RemoteProtocolError`."""
    if type(fields) is not list or len(fields) < 2:
        raise RemoteProtocolError("a frame is not a list of at least a type and a request id")
    number, request = fields[0], fields[1]
    if type(number) is not int or (shape := SHAPES.get(number)) is None:
        raise RemoteProtocolError(f"unknown packet type {shown(number)}")
    if not is_u32(request):
        raise RemoteProtocolError(f"the request id {shown(request)} is not a 32-bit number")
    packet, checks = shape
    wanted = len(checks)
    values = fields[2 : 2 + wanted]
    if len(values) < wanted:
        raise RemoteProtocolError(f"{packet.__name__} has {len(values)} fields, not {wanted}")
    for name, check, value in zip(packet._fields[1:], checks, values, strict=True):
        if not check(value):
            raise RemoteProtocolError(f"{packet.__name__}.{name} is not valid: {shown(value)}")
    return packet(request, *values)  # type: ignore[no-any-return]
