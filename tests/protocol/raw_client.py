"""A synchronous client of the wire protocol, written from doc/protocol.md alone; five silent seconds are an error."""

import itertools
import os
import socket
import struct
import time
import zlib
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Self

import msgpack

HELLO, WELCOME, REFUSAL, PING, PONG, GOODBYE = 1, 2, 3, 4, 5, 6
PUBLISH, RECEIPTS, CREDIT, DELIVER, ACK, NACK, SETTLED = 16, 17, 24, 25, 26, 27, 28
CRC_OF_WHOLE_MESSAGE: Final = 0x2144DF1C
FIXED: Final = struct.Struct(">16sIQH")


class RefusedError(Exception):
    """The broker answered `Refusal`; the arguments are its code, reason and temporary."""


@dataclass(frozen=True)
class Message:
    """A message as its producer states it."""

    topic: str
    type: str
    body: bytes
    ttl_ms: int = 60_000
    deliver_limit: int = 100
    flags: int = 0
    properties: dict[str, str] = field(default_factory=dict)
    key: str | None = None
    delay_ms: int | None = None
    deliver_at_ms: int | None = None
    id: bytes = field(default_factory=lambda: os.urandom(16))
    created_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)

    def encode(self) -> bytes:
        """Return the bytes of the message, both checksums included."""
        head: bytes = msgpack.packb([self.topic, self.type, self.ttl_ms, self.deliver_limit, self.flags])
        options = [self.properties, self.key, self.delay_ms, self.deliver_at_ms]
        extras = msgpack.packb(options) if any(options) else b""
        rest = FIXED.pack(self.id, zlib.crc32(self.body), self.created_ms, len(head)) + head
        rest += struct.pack(">H", len(extras)) + extras + self.body
        return rest + struct.pack("<I", zlib.crc32(rest))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Check and take apart the bytes of a message."""
        identity, body_crc, created_ms, head_length = FIXED.unpack_from(data)
        extras_at = FIXED.size + head_length
        body_at = extras_at + 2 + struct.unpack_from(">H", data, extras_at)[0]
        head, extras, body = data[FIXED.size : extras_at], data[extras_at + 2 : body_at], data[body_at:-4]
        if zlib.crc32(data) != CRC_OF_WHOLE_MESSAGE or zlib.crc32(body) != body_crc:
            raise ValueError("the message is damaged")
        topic, message_type, *rest = msgpack.unpackb(head)[:5]
        options = [*(msgpack.unpackb(extras) if extras else ({}, None, None)), None][:4]
        rest += [*options, identity, created_ms]
        return cls(topic, message_type, body, *rest)


class Delivery(NamedTuple):
    """A delivered message: the tag to answer it by, which attempt it is, its bytes, and what they say."""

    tag: int
    attempt: int
    data: bytes
    message: Message


class RawClient(AbstractContextManager[Any]):
    """One connection; a call that is a request returns when it is answered. Leaving the block just closes it."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port), timeout=5.0)
        self._file = self._socket.makefile("rb")
        self.limits: dict[str, int] = {"frame_bytes": 2_097_152}
        self._requests = itertools.count(1)
        self._deliveries: deque[Delivery] = deque()

    def __exit__(self, *_error: object) -> None:
        self._file.close()
        self._socket.close()

    def greet(self, group: str, topic: str, type: str, versions: tuple[int, ...] = (1,)) -> None:
        """Say hello with a persistent direct binding."""
        hello = ("kiteq", versions, os.urandom(16), group, [topic], [[topic, 0, type, None, True, "latest"]], 0, 1)
        self.limits = self.ask(HELLO, *hello, answer=WELCOME)[2]

    def publish(self, *messages: bytes) -> tuple[list[int], bool, list[list[Any]]]:
        """Send encoded messages in one frame; return groups (one for each), durable and exceptions."""
        groups, durable, exceptions = self.ask(PUBLISH, messages, answer=RECEIPTS)[:3]
        return _each(groups, len(messages)), durable, exceptions

    def grant(self, window: int) -> None:
        """Allow that many unacked messages on this connection."""
        self._send(CREDIT, next(self._requests), window)

    def receive(self) -> Delivery:
        """Wait for the next delivery."""
        while not self._deliveries:
            self._next_packet()
        return self._deliveries.popleft()

    def ack(self, *tags: int) -> list[int]:
        """Tell that messages are done, wait until that is durable; return the ranges of stale tags."""
        return list(self.ask(ACK, [end for tag in tags for end in (tag, tag)], answer=SETTLED)[0])

    def nack(self, tag: int, error: str, how: int = 0) -> list[int]:
        """Give a message back, wait until that is durable; return the ranges of stale tags."""
        return list(self.ask(NACK, [[tag, how, None, error]], answer=SETTLED)[0])

    def goodbye(self) -> None:
        """Hand back what is not acked; return when the broker has seen that and closed."""
        self._send(GOODBYE, next(self._requests), "done")
        self._socket.shutdown(socket.SHUT_WR)
        self._file.read()

    def ask(self, number: int, *fields: object, answer: int) -> list[Any]:
        """Send a request; return the fields of its answer."""
        self._send(number, request := next(self._requests), *fields)
        while True:
            kind, answered, *values = self._next_packet()
            if kind == REFUSAL and answered in {0, request}:
                raise RefusedError(*values[:3])
            if (kind, answered) == (answer, request):
                return values

    def _send(self, *packet: object) -> None:
        data: bytes = msgpack.packb(packet)
        self._socket.sendall(struct.pack(">I", len(data)) + data)

    def _next_packet(self) -> list[Any]:
        length = int.from_bytes(self._file.read(4), "big")
        frame = self._file.read(length) if length <= self.limits["frame_bytes"] else b""
        if not frame or len(frame) < length:
            raise ConnectionResetError("the broker closed the connection, or sent a frame of a wrong length")
        packet: list[Any] = msgpack.unpackb(frame)
        if packet[0] == PING:
            self._send(PONG, packet[1])
        if packet[0] == DELIVER:
            tag, attempts, messages = packet[2:5]
            whole = zip(itertools.count(tag), _each(attempts, len(messages)), messages, strict=False)
            self._deliveries.extend(Delivery(*one, Message.decode(one[2])) for one in whole)
        return packet


def _each(numbers: int | list[int], count: int) -> list[int]:
    return [numbers] * count if isinstance(numbers, int) else numbers
