"""The packets of the wire protocol: what each frame says, and the checks it must pass.

`doc/protocol.md` describes them byte by byte. A packet is a msgpack array `[type, request, fields...]`;
fields a peer sends beyond those known here are ignored, so that later versions can add some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from kiteq.errors import RemoteProtocolError
from kiteq.limits import ERROR_LENGTH_MAX, FRAME_ITEMS_MAX, PREFETCH_MAX

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
    """Client to broker: ranges of tags it still works on; no answer."""

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


def _is_u32(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


def _is_text(value: object) -> bool:
    return type(value) is str and len(value) <= 4 * ERROR_LENGTH_MAX


def _is_bool(value: object) -> bool:
    return type(value) is bool


def _is_blobs(value: object) -> bool:
    return type(value) is list and 0 < len(value) <= FRAME_ITEMS_MAX and set(map(type, value)) == {bytes}


def _is_ints(value: object) -> bool:
    return (
        type(value) is list and (not value or set(map(type, value)) == {int}) and all(0 <= i < 1 << 63 for i in value)
    )


def _is_texts(value: object) -> bool:
    return type(value) is list and all(map(_is_text, value))


def _is_lists(value: object) -> bool:
    return type(value) is list and (not value or set(map(type, value)) == {list})


def _is_ranges(value: object) -> bool:
    return _is_ints(value) and len(value) % 2 == 0 and all(map(int.__le__, value[::2], value[1::2]))  # type: ignore[index, arg-type]


def _is_int_or_ints(value: object) -> bool:
    return _is_u32(value) or _is_ints(value)


def _is_binding(item: list[Any]) -> bool:
    return (
        len(item) >= 6
        and type(item[0]) is str
        and item[1] in (0, 1, 2)
        and type(item[2]) is str
        and (item[3] is None or _is_u32(item[3]))
        and type(item[4]) is bool
        and type(item[5]) is str
    )


def _is_bindings(value: object) -> bool:
    return _is_lists(value) and all(map(_is_binding, value))  # type: ignore[call-overload]


def _is_nack(item: list[Any]) -> bool:
    return (
        len(item) >= 4
        and type(item[0]) is int
        and item[1] in (NACK_FAILED, NACK_REJECTED, NACK_UNSTARTED)
        and (item[2] is None or _is_u32(item[2]))
        and type(item[3]) is str
    )


def _is_nacks(value: object) -> bool:
    return _is_lists(value) and all(map(_is_nack, value))  # type: ignore[call-overload]


def _is_exception(item: list[Any]) -> bool:
    return len(item) >= 4 and _is_u32(item[0]) and _is_text(item[1]) and _is_text(item[2]) and _is_bool(item[3])


def _is_exceptions(value: object) -> bool:
    return _is_lists(value) and all(map(_is_exception, value))  # type: ignore[call-overload]


def _is_map(value: object) -> bool:
    return type(value) is dict and all(type(name) is str for name in value)


def _is_limits(value: object) -> bool:
    return _is_map(value) and all(type(limit) is int for limit in value.values())  # type: ignore[attr-defined]


def _is_instance(value: object) -> bool:
    return type(value) is bytes and len(value) == 16


def _is_window(value: object) -> bool:
    return type(value) is int and 0 <= value <= PREFETCH_MAX


def _is_tag(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_any(value: object) -> bool:  # noqa: ARG001 the check that accepts everything
    return True


Check = Callable[[object], bool]

SHAPES: Final[dict[int, tuple[type[Any], tuple[Check, ...]]]] = {
    1: (Hello, (_is_text, _is_ints, _is_instance, _is_text, _is_texts, _is_bindings, _is_u32, _is_u32)),
    2: (Welcome, (_is_u32, _is_text, _is_limits, _is_bool)),
    3: (Refusal, (_is_text, _is_text, _is_bool)),
    4: (Ping, ()),
    5: (Pong, ()),
    6: (Goodbye, (_is_text,)),
    # 7 to 9 are reserved for authentication
    16: (Publish, (_is_blobs,)),
    17: (Receipts, (_is_int_or_ints, _is_bool, _is_exceptions)),
    18: (Subscribe, (_is_bindings,)),
    19: (Subscribed, ()),
    20: (Unsubscribe, (_is_text, _is_u32, _is_text)),
    24: (Credit, (_is_window,)),
    25: (Deliver, (_is_tag, _is_int_or_ints, _is_blobs)),
    26: (Ack, (_is_ranges,)),
    27: (Nack, (_is_nacks,)),
    28: (Settled, (_is_ranges,)),
    29: (Extend, (_is_ranges,)),
    # 32 to 47 are reserved for transactions
    48: (Admin, (_is_text, _is_map)),
    49: (AdminReply, (_is_any,)),
}
TYPE_NUMBERS: Final[dict[type[Any], int]] = {shape[0]: number for number, shape in SHAPES.items()}


def parse_packet(fields: object) -> Packet:
    """Return the packet of a decoded frame. Raises `RemoteProtocolError`."""
    if type(fields) is not list or len(fields) < 2:
        raise RemoteProtocolError("a frame is not a list of at least a type and a request id")
    number, request = fields[0], fields[1]
    if type(number) is not int or (shape := SHAPES.get(number)) is None:
        raise RemoteProtocolError(f"unknown packet type {number!r}"[:200])
    if not _is_u32(request):
        raise RemoteProtocolError(f"the request id {request!r} is not a 32-bit number"[:200])
    packet, checks = shape
    wanted = len(checks)
    values = fields[2 : 2 + wanted]
    if len(values) < wanted:
        raise RemoteProtocolError(f"{packet.__name__} has {len(values)} fields, not {wanted}")
    for name, check, value in zip(packet._fields[1:], checks, values, strict=True):
        if not check(value):
            raise RemoteProtocolError(f"{packet.__name__}.{name} is not valid: {value!r}"[:200])
    return packet(request, *values)  # type: ignore[no-any-return]
