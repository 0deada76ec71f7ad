"""Producers that write whole frames to a socket: what the broker costs, with next to nothing of a client around it."""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from benchmark.load.channel import NUMBER, Job, Timer, say
from kiteq.limits import FRAME_OVERHEAD_BYTES
from kiteq.message import Message
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import (
    DECISION_COMMIT,
    PROTOCOL,
    WIRE_VERSION,
    Decide,
    Decided,
    Hello,
    Packet,
    Prepare,
    Prepared,
    Publish,
    Receipts,
    Welcome,
)

FRAME_MESSAGES: Final = 250
"""As many as the client puts in a frame, about."""
CHECK_AFTER_MS: Final = 3_600_000
"""No checks while it is measured."""


class _Connection:
    """A blocking connection; packets are sent at once and read one by one."""

    def __init__(self, job: Job) -> None:
        self._socket = socket.create_connection(("127.0.0.1", job.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._decoder = Decoder(2 * FRAME_OVERHEAD_BYTES)
        self._packets: deque[Packet] = deque()
        self._request = 0
        self.send(Hello, PROTOCOL, [WIRE_VERSION], os.urandom(16), job.group, [job.topic], [], 0, 1)
        self.read(Welcome)

    def send(self, kind: Callable[..., Packet], *fields: Any) -> int:
        self._request += 1
        self._socket.sendall(encode_packet(kind(self._request, *fields)))
        return self._request

    def read(self, *kinds: type[Any]) -> Any:
        while not self._packets:
            chunk = self._socket.recv(1 << 18)
            if not chunk:
                raise ConnectionError("the broker closed the connection")
            self._packets.extend(self._decoder.feed(chunk))
        packet = self._packets.popleft()
        if not isinstance(packet, kinds) or getattr(packet, "exceptions", None):
            raise RuntimeError(f"the broker answered {packet}"[:500])
        return packet


def _frames(job: Job) -> Iterator[list[bytes]]:
    padding = job.padding()
    numbers = range(job.first, job.first + job.count)
    for start in range(0, job.count, FRAME_MESSAGES):
        yield [
            Message(job.topic, job.message_type, NUMBER.pack(number, 0) + padding).encoded()
            for number in numbers[start : start + FRAME_MESSAGES]
        ]


def _run(job: Job, work: Callable[[_Connection, list[list[bytes]]], None]) -> None:
    """Build all frames first: both kinds of work then cost the same here, nothing."""
    connection, frames = _Connection(job), list(_frames(job))
    say(ready=True)
    sys.stdin.readline()
    timer = Timer()
    work(connection, frames)
    say(done=True, sent=job.count, **timer.fields())


def publish(job: Job) -> None:
    """Plain durable sends, `window` messages unanswered."""

    def work(connection: _Connection, frames: list[list[bytes]]) -> None:
        unanswered: dict[int, int] = {}
        for blobs in frames:
            while sum(unanswered.values()) + len(blobs) > job.window:
                del unanswered[connection.read(Receipts).request]
            unanswered[connection.send(Publish, blobs)] = len(blobs)
        while unanswered:
            del unanswered[connection.read(Receipts).request]

    _run(job, work)


def transact(job: Job) -> None:
    """Half messages, each frame committed as soon as it is durable; `window` messages without both answers."""

    def work(connection: _Connection, frames: list[list[bytes]]) -> None:
        prepared: dict[int, list[bytes]] = {}
        deciding: dict[int, int] = {}

        def step() -> None:
            packet = connection.read(Prepared, Decided)
            if type(packet) is Decided:
                del deciding[packet.request]
                return
            ids = prepared.pop(packet.request)
            tokens = [one + (packet.handles + at).to_bytes(8, "big") for at, one in enumerate(ids)]
            deciding[connection.send(Decide, DECISION_COMMIT, tokens)] = len(ids)

        for blobs in frames:
            while sum(map(len, prepared.values())) + sum(deciding.values()) + len(blobs) > job.window:
                step()
            prepared[connection.send(Prepare, blobs, 1, CHECK_AFTER_MS)] = [blob[:16] for blob in blobs]
        while prepared or deciding:
            step()

    _run(job, work)


def prepare(job: Job) -> None:
    """Half messages that stay open."""
    connection = _Connection(job)
    say(ready=True)
    sys.stdin.readline()
    timer = Timer()
    unanswered = sent = 0
    for blobs in _frames(job):
        while unanswered + len(blobs) > job.window:
            connection.read(Prepared)
            unanswered -= FRAME_MESSAGES
        connection.send(Prepare, blobs, 1, CHECK_AFTER_MS)
        unanswered += len(blobs)
        sent += len(blobs)
        if sent % (100 * FRAME_MESSAGES) == 0:
            say(progress=sent)
    while unanswered > 0:
        connection.read(Prepared)
        unanswered -= FRAME_MESSAGES
    say(done=True, sent=sent, **timer.fields())
