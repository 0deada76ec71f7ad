r"""A message: its values, and its encoding, which is made once by the producer and never changed.

    offset   bytes  content (integers are big-endian but for the last)
    0        16     message id
    16       4      CRC-32 of the body: tells a repeated send from a reused id
    20       8      created at, milliseconds since 1970
    28       2      h, length of the head
    30       h      head: msgpack [topic, message type, TTL ms, deliver limit, flags]
    30+h     2      x, length of the extras, 0 for none
    32+h     x      extras: msgpack [properties, key or nil, delay ms or nil], and if there is one,
                   the time to deliver at, milliseconds since 1970
    32+h+x   b      body
    end-4    4      CRC-32 of all before it, *little-endian*

Messages of one kind share their head byte for byte, so broker and consumer look the decoded head up
instead of decoding it again. The CRC-32 of bytes that end in their own CRC-32, little-endian, is the
constant `CRC_RESIDUE`, so one call over the whole checks a message.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NamedTuple
from zlib import crc32

import msgpack

from kiteq.errors import KiteQError, MessageTooLarge, Refused
from kiteq.ids import check_id, new_id
from kiteq.limits import (
    BODY_BYTES_MAX_CEILING,
    DELAY_MS_MAX,
    DELIVER_LIMIT_MAX,
    EXTRAS_BYTES_MAX,
    NAME_LENGTH_MAX,
    PROPERTIES_MAX,
    TTL_MS_MAX,
)
from kiteq.times import delay_milliseconds, deliver_at_milliseconds, epoch_seconds, ttl_milliseconds

__all__ = [
    "CRC_RESIDUE",
    "FLAG_FLY",
    "FLAG_TEXT",
    "HEAD_OFFSET",
    "OVERHEAD_BYTES_MIN",
    "BadMessage",
    "Extras",
    "Head",
    "Message",
    "Receipt",
    "Received",
    "check_name",
    "decode",
    "encode",
    "new_id",
    "parse_extras",
    "parse_head",
    "split",
]

CRC_RESIDUE: Final = 0x2144DF1C
HEAD_OFFSET: Final = 28
"""Where the length of the head stands; the head and its length are the key of the route cache."""
OVERHEAD_BYTES_MIN: Final = 32 + 4
FLAG_TEXT: Final = 1
"""The producer gave a `str`; the body is its UTF-8 bytes."""
FLAG_FLY: Final = 2
"""Never stored."""
FLAGS_KNOWN: Final = FLAG_TEXT | FLAG_FLY

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@+-]{0,254}", re.ASCII)
_SHORT = struct.Struct(">H")
_CRC = struct.Struct("<I")
_NO_PROPERTIES: Mapping[str, str] = MappingProxyType({})


class BadMessage(KiteQError):
    """Encoded bytes that are not a message of this format; `code` and `reason` as in `Refused`."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Head(NamedTuple):
    """What messages of one kind share."""

    topic: str
    message_type: str
    ttl_ms: int
    deliver_limit: int
    flags: int


class Extras(NamedTuple):
    """What only some messages have: at most one of delay and deliver_at, in milliseconds, this since 1970."""

    properties: Mapping[str, str]
    key: str | None
    delay_ms: int | None
    deliver_at_ms: int | None


def check_name(kind: str, name: object) -> str:
    """Return `name` if it may name a topic, message type or group; `kind` is for the error's text.

    Raises `ValueError` otherwise.
    """
    if not isinstance(name, str):
        raise ValueError(f"a {kind} must be a str, not {type(name).__name__}")  # noqa: TRY004 one kind of error
    if _NAME.fullmatch(name) is None:
        shown = name if len(name) <= 64 else name[:61] + "..."
        raise ValueError(
            f"{shown!r} is not a valid {kind}: 1 to {NAME_LENGTH_MAX} letters, digits or . _ : @ + - "
            "(the first a letter, digit or _)"
        )
    return name


class Message:
    """What a producer sends.

    topic, message_type: the two levels of the address.
    body: `bytes`, or a `str` that travels as UTF-8.
    id: 16 bytes or 32 hex digits; made here when left out, so sending this object again is safe.
    properties: up to 128 strings by name; at most 64 KiB encoded, with the key.
    ttl: seconds, above 0, up to 7 days, counted from the moment of becoming deliverable; None is 7 days.
    deliver_limit: attempts per group before the message becomes a dead letter, 1 to 100.
    delay: seconds, 0 to 366 days, until it becomes deliverable, counted from when the broker has it; in a
        transaction from the commit.
    deliver_at: the time when it becomes deliverable, at most 366 days ahead: seconds since 1970, or a `datetime`
        with a time zone. At once when it has passed. Kept as seconds.
    key: ordering key (carried to the consumer; brokers of this version do not order by it).
    fly: never stored: delivered once to who is there.

    Raises `ValueError` for a value out of range.
    """

    __slots__ = (
        "_encoded", "body", "delay", "deliver_at", "deliver_limit", "fly", "given_to", "id", "key", "message_type",
        "properties", "text_sent", "topic", "ttl",
    )  # fmt: skip

    def __init__(
        self,
        topic: str,
        message_type: str,
        body: bytes | str = b"",
        *,
        id: bytes | str | None = None,
        properties: Mapping[str, str] = _NO_PROPERTIES,
        ttl: float | None = None,
        deliver_limit: int = DELIVER_LIMIT_MAX,
        delay: float | None = None,
        deliver_at: float | datetime | None = None,
        key: str | None = None,
        fly: bool = False,
    ) -> None:
        self.topic = topic
        self.message_type = message_type
        self.text_sent = type(body) is str
        if type(body) is str:
            self.body = body.encode()
        elif type(body) is bytes:
            self.body = body
        else:
            raise ValueError(f"a body must be bytes or str, not {type(body).__name__}")
        self.id = new_id() if id is None else check_id(id)
        self.properties = properties
        self.ttl = ttl
        self.deliver_limit = deliver_limit
        self.delay = delay
        self.deliver_at = epoch_seconds(deliver_at) if isinstance(deliver_at, datetime) else deliver_at
        self.key = key
        self.fly = fly
        self._encoded: bytes | None = None
        self.given_to = ""  # the broker that a client sent it to
        if delay is not None and deliver_at is not None:
            raise ValueError("give delay or deliver_at, not both")
        if fly and (delay is not None or deliver_at is not None or key is not None):
            raise ValueError("a fly message has neither delay nor key")

    @property
    def text(self) -> str:
        """The body decoded as UTF-8."""
        return self.body.decode()

    def encoded(self) -> bytes:
        """Return the encoding, made at the first call and kept."""
        if self._encoded is None:
            self._encoded = encode(self)
        return self._encoded

    def __repr__(self) -> str:
        """Show where it goes and its id; bodies stay out of logs."""
        return f"{type(self).__name__}({self.topic!r}, {self.message_type!r}, id={self.id.hex()})"


class Received(Message):
    """What a consumer gets: a message, and about this delivery `group`, `created_at` and `attempt`.

    created_at: seconds since 1970, by the producer's clock. attempt: 1 for the first.
    """

    __slots__ = ("attempt", "created_at", "group")

    group: str
    created_at: float
    attempt: int


class Receipt(NamedTuple):
    """The broker's answer to one message.

    groups: how many groups were bound to it, None when that is not known (a duplicate) or not yet (delayed).
    duplicate: the broker had this message already, and stored nothing.
    durable: on disk before this answer (not so for fly messages and with `--flush async`).
    """

    message_id: bytes
    broker: str
    groups: int | None
    duplicate: bool
    durable: bool

    def __repr__(self) -> str:
        """Show the id as the command line does."""
        return (
            f"Receipt({self.message_id.hex()}, broker={self.broker!r}, groups={self.groups}, "
            f"duplicate={self.duplicate}, durable={self.durable})"
        )


_heads: dict[tuple[Any, ...], bytes] = {}
_HEADS_CACHED_MAX = 10_000


def _head_bytes(message: Message) -> bytes:
    kind = (message.topic, message.message_type, message.ttl, message.deliver_limit, message.text_sent, message.fly)
    known = _heads.get(kind)
    if known is not None:
        return known
    check_name("topic", message.topic)
    check_name("message type", message.message_type)
    ttl_ms = ttl_milliseconds(message.ttl)
    limit = message.deliver_limit
    if type(limit) is not int or not 1 <= limit <= DELIVER_LIMIT_MAX:
        raise ValueError(f"deliver_limit must be 1 to {DELIVER_LIMIT_MAX}, not {limit}")
    flags = FLAG_TEXT * message.text_sent | FLAG_FLY * bool(message.fly)
    head: bytes = msgpack.packb([message.topic, message.message_type, ttl_ms, limit, flags])
    if len(_heads) >= _HEADS_CACHED_MAX:
        _heads.clear()
    _heads[kind] = prefixed = _SHORT.pack(len(head)) + head
    return prefixed


def _extras_bytes(message: Message) -> bytes:
    properties = dict(message.properties)
    if len(properties) > PROPERTIES_MAX:
        raise ValueError(f"at most {PROPERTIES_MAX} properties, not {len(properties)}")
    if not all(type(name) is str and type(value) is str for name, value in properties.items()):
        raise ValueError("properties must map str to str")
    if message.key is not None:
        check_name("key", message.key)
    delay_ms = None if message.delay is None else delay_milliseconds(message.delay)
    fields: list[Any] = [properties, message.key, delay_ms]
    if message.deliver_at is not None:
        fields.append(deliver_at_milliseconds(message.deliver_at))
    extras: bytes = msgpack.packb(fields)
    if len(extras) > EXTRAS_BYTES_MAX:
        raise ValueError(f"properties and key take {len(extras)} bytes encoded, the limit is {EXTRAS_BYTES_MAX}")
    return _SHORT.pack(len(extras)) + extras


def encode(message: Message) -> bytes:
    """Return the encoding of a message.

    Raises `ValueError` for a value out of range and `MessageTooLarge` for a body over 64 MiB.
    """
    body = message.body
    if len(body) > BODY_BYTES_MAX_CEILING:
        raise MessageTooLarge("message_too_large", f"a body of {len(body)} bytes is over {BODY_BYTES_MAX_CEILING}")
    plain = not message.properties and message.key is None and message.delay is None and message.deliver_at is None
    fixed = message.id + _BODY_AND_TIME.pack(crc32(body), time.time_ns() // 1_000_000)
    content = b"".join((fixed, _head_bytes(message), b"\0\0" if plain else _extras_bytes(message), body))
    return content + _CRC.pack(crc32(content))


_BODY_AND_TIME = struct.Struct(">IQ")


def parse_head(head: bytes) -> Head:
    """Decode and check the head of a message. Raises `BadMessage`."""
    try:
        fields = msgpack.unpackb(head)
    except ValueError as error:
        raise BadMessage("bad_message", f"the head of a message is not msgpack: {error}") from error
    if type(fields) is not list or len(fields) < len(Head._fields):
        raise BadMessage("bad_message", "the head of a message is not a list of five")
    topic, message_type, ttl_ms, deliver_limit, flags = fields[:5]
    try:
        check_name("topic", topic)
        check_name("message type", message_type)
    except ValueError as error:
        raise BadMessage("bad_name", str(error)) from error
    if type(ttl_ms) is not int or not 1 <= ttl_ms <= TTL_MS_MAX:
        raise BadMessage("bad_limit", f"the TTL must be 1 to {TTL_MS_MAX} ms")
    if type(deliver_limit) is not int or not 1 <= deliver_limit <= DELIVER_LIMIT_MAX:
        raise BadMessage("bad_limit", f"the deliver limit must be 1 to {DELIVER_LIMIT_MAX}")
    if type(flags) is not int or not 0 <= flags <= FLAGS_KNOWN:
        raise BadMessage("bad_message", "unknown message flags")
    return Head(topic, message_type, ttl_ms, deliver_limit, flags)


def parse_extras(extras: bytes) -> Extras:
    """Decode and check the extras of a message. Raises `BadMessage`."""
    if not extras:
        return Extras(_NO_PROPERTIES, None, None, None)
    try:
        fields = msgpack.unpackb(extras)
    except ValueError as error:
        raise BadMessage("bad_message", f"the extras of a message are not msgpack: {error}") from error
    if type(fields) is not list or len(fields) < 3:
        raise BadMessage("bad_message", "the extras of a message are not a list of three")
    properties, key, delay_ms, deliver_at_ms = (*fields, None)[:4]
    if type(properties) is not dict or len(properties) > PROPERTIES_MAX:
        raise BadMessage("bad_properties", f"properties must be a map of at most {PROPERTIES_MAX}")
    if not all(type(name) is str and type(value) is str for name, value in properties.items()):
        raise BadMessage("bad_properties", "properties must map strings to strings")
    if key is not None and (type(key) is not str or _NAME.fullmatch(key) is None):
        raise BadMessage("bad_name", "the key is not a valid name")
    if delay_ms is not None and (type(delay_ms) is not int or not 0 <= delay_ms <= DELAY_MS_MAX):
        raise BadMessage("bad_limit", f"the delay must be 0 to {DELAY_MS_MAX} ms")
    if deliver_at_ms is not None and (type(deliver_at_ms) is not int or deliver_at_ms < 0):
        raise BadMessage("bad_limit", "the time to deliver at must be milliseconds since 1970")
    if delay_ms is not None and deliver_at_ms is not None:
        raise BadMessage("bad_limit", "a message has a delay or a time to deliver at, not both")
    return Extras(properties, key, delay_ms, deliver_at_ms)


def split(blob: bytes) -> tuple[bytes, bytes, int]:
    """Return head, extras and the offset of the body of an encoded message. Raises `BadMessage`."""
    size = len(blob)
    if size >= OVERHEAD_BYTES_MIN:
        head_end = 30 + _SHORT.unpack_from(blob, 28)[0]
        if head_end + 2 <= size - 4:
            body_at = head_end + 2 + _SHORT.unpack_from(blob, head_end)[0]
            if body_at <= size - 4:
                return blob[30:head_end], blob[head_end + 2 : body_at], body_at
    raise BadMessage("bad_message", "a message is cut short")


_known_heads: dict[bytes, Head] = {}
_new_received = Received.__new__
_TIME = struct.Struct(">Q")


def decode(blob: bytes, group: str, attempt: int) -> Received:
    """Return the message of an encoding, as delivered to `group`. Raises `BadMessage`."""
    if crc32(blob) != CRC_RESIDUE:
        raise BadMessage("bad_checksum", "the checksum of a message does not match its bytes")
    head_bytes, extras_bytes, body_at = split(blob)
    head = _known_heads.get(head_bytes)
    if head is None:
        head = parse_head(head_bytes)
        if len(_known_heads) >= _HEADS_CACHED_MAX:
            _known_heads.clear()
        _known_heads[head_bytes] = head
    received = _new_received(Received)
    received.topic, received.message_type, ttl_ms, received.deliver_limit, flags = head
    received.body = blob[body_at:-4]
    received.text_sent = flags & FLAG_TEXT != 0
    received.fly = flags & FLAG_FLY != 0
    received.id = blob[:16]
    received.ttl = ttl_ms / 1000
    if extras_bytes:
        received.properties, received.key, delay_ms, deliver_at_ms = parse_extras(extras_bytes)
        received.delay = None if delay_ms is None else delay_ms / 1000
        received.deliver_at = None if deliver_at_ms is None else deliver_at_ms / 1000
    else:
        received.properties, received.key = _NO_PROPERTIES, None
        received.delay = received.deliver_at = None
    received._encoded = None  # noqa: SLF001 a copy sent on is encoded anew
    received.given_to = ""
    received.group = group
    received.created_at = _TIME.unpack_from(blob, 20)[0] / 1000
    received.attempt = attempt
    return received


def refuse_too_large(size: int, limit: int) -> Refused:
    """Return the error for a body over the limit of the broker."""
    return MessageTooLarge("message_too_large", f"a body of {size} bytes is over this broker's limit of {limit}")
