"""A client that hides nothing: one connection, its tags, its answers and its end, each noted in a history.

It speaks the wire protocol by the codec alone. There is no task behind it: whoever owns a connection
calls `receive`, which notes what came and answers pings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from os import urandom
from typing import Any, Final, NamedTuple

import trio

from kiteq.binding.bindings import Binding, to_wire
from kiteq.errors import RemoteProtocolError
from kiteq.limits import BODY_BYTES_MAX_DEFAULT, FRAME_OVERHEAD_BYTES
from kiteq.message import Message
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import (
    NACK_FAILED,
    NACK_REJECTED,
    NACK_UNSTARTED,
    PROTOCOL,
    RECEIPT_DELAYED,
    RECEIPT_DUPLICATE,
    WIRE_VERSION,
    Ack,
    Admin,
    AdminReply,
    Credit,
    Deliver,
    Extend,
    Goodbye,
    Hello,
    Nack,
    Packet,
    Ping,
    Pong,
    Publish,
    Receipts,
    Refusal,
    Settled,
    Welcome,
)
from tests.faults.half_driver import Transacting
from tests.faults.history import (
    Bound,
    Delivered,
    Ended,
    Event,
    Extended,
    History,
    Opened,
    PublishInvoked,
    PublishOk,
    PublishRefused,
    PublishUnknown,
    SettleOk,
    Settling,
    digest_of,
)

__all__ = ["Arrival", "DriverConnection", "Lost", "open_connection"]

FRAME_BYTES_MAX: Final = BODY_BYTES_MAX_DEFAULT + FRAME_OVERHEAD_BYTES
ANSWER_SECONDS_MAX: Final = 10.0
HOW: Final = {NACK_FAILED: "failed", NACK_REJECTED: "rejected", NACK_UNSTARTED: "unstarted"}

_connections = count(1)
_calls = count(1)


class Lost(Exception):
    """The connection is gone, or was never welcomed; what had no answer is unknown."""


class Arrival(NamedTuple):
    """A message that just came."""

    tag: int
    id: str
    attempt: int
    blob: bytes


async def open_connection(
    port: int,
    group: str,
    history: History,
    *,
    topics: Sequence[str] = (),
    bindings: Sequence[Binding] = (),
    concurrency: int = 1,
    host: str = "127.0.0.1",
) -> DriverConnection:
    """Connect to a broker and greet it. Raises `Lost`."""
    noted = [[binding.topic, int(binding.kind), binding.pattern, binding.persistent] for binding in bindings]
    try:
        with trio.fail_after(ANSWER_SECONDS_MAX):
            stream = await trio.open_tcp_stream(host, port)
    except (OSError, trio.TooSlowError) as error:
        raise Lost(str(error)) from error
    connection = DriverConnection(stream, f"{group}-{next(_connections)}", group, history)
    connection.topics = list(topics)
    if noted:
        history.write(Bound(time.monotonic(), group, noted, False))
    wire = [to_wire(binding) for binding in bindings]
    hello = Hello(1, PROTOCOL, [WIRE_VERSION], urandom(16), group, list(topics), wire, 0, concurrency)
    try:
        with trio.fail_after(ANSWER_SECONDS_MAX):
            await connection.greet(hello)
    except (Lost, trio.TooSlowError) as error:
        await stream.aclose()
        raise Lost(f"no welcome: {error}") from error
    if noted:
        history.write(Bound(time.monotonic(), group, noted, True))
    return connection


class DriverConnection:
    """One welcomed connection; every method raises `Lost` when it is gone."""

    def __init__(self, stream: trio.SocketStream, name: str, group: str, history: History) -> None:
        self._stream = stream
        self.name = name
        self.group = group
        self._history = history
        self._decoder = Decoder(FRAME_BYTES_MAX)
        self._requests = count(2)
        self._publishing: dict[int, list[str]] = {}
        self._settling: dict[int, list[int]] = {}
        self._answers: dict[int, Any] = {}
        self._arrived: list[Arrival] = []
        self.receipts: dict[str, PublishOk | PublishRefused] = {}
        """By call, for the owner to look at."""
        self.stale: set[int] = set()
        self.topics: list[str] = []
        self.digest: Callable[[bytes], str] = digest_of
        """What a history keeps of a message's bytes."""
        self.transacting = Transacting(self)
        self.open = False
        self.left = False
        """The broker said goodbye."""
        self.heard_at = time.monotonic()
        self._asked_at = self.heard_at

    @property
    def unanswered(self) -> int:
        """Frames without an answer, but for administrative ones."""
        return len(self._publishing) + len(self._settling) + self.transacting.unanswered

    def next_request(self) -> int:
        """Return a number for a request."""
        return next(self._requests)

    def note(self, event: Event) -> None:
        """Write an event to the history."""
        self._history.write(event)

    # --- the wire -----------------------------------------------------------------------------

    async def greet(self, hello: Hello) -> None:
        """Send a greeting and wait until it is welcomed."""
        try:
            await self._stream.send_all(encode_packet(hello))
            packets: list[Packet] = []
            while not packets:
                chunk = await self._stream.receive_some(65_536)
                packets = self._decoder.feed(chunk)
                if not chunk:
                    raise Lost("the broker ended the connection instead of a welcome")
        except trio.BrokenResourceError as error:
            raise Lost(str(error)) from error
        if not isinstance(packets[0], Welcome):
            raise Lost(f"not welcomed: {packets[0]}")
        self.open = True
        self._history.write(Opened(time.monotonic(), self.name, self.group, self.topics))
        await self._take_all(packets[1:])

    async def transmit(self, packet: Packet) -> None:
        """Send a packet."""
        if not self.open:
            raise Lost("ended before")
        try:
            await self._stream.send_all(encode_packet(packet))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            await self._end("lost")
            raise Lost(str(error)) from error

    async def receive(self) -> list[Arrival]:
        """Wait for one chunk of bytes; return the messages in it. Safe to cancel."""
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            return arrived
        if not self.open:
            raise Lost("ended before")
        try:
            chunk = await self._stream.receive_some(262_144)
            packets = self._decoder.feed(chunk)
        except (trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError) as error:
            await self._end("lost")
            raise Lost(str(error)) from error
        if not chunk:
            await self._end("lost")
            raise Lost("the broker ended the connection")
        self.heard_at = time.monotonic()
        await self._take_all(packets)
        arrived, self._arrived = self._arrived, []
        return arrived

    async def stay_sure(self, seconds: float) -> None:
        """Call it again and again: it asks for a sign of life, and gives the connection up after so long without."""
        now = time.monotonic()
        if now > self.heard_at + seconds:
            await self._end("lost")
            raise Lost(f"the broker said nothing for {seconds:g} s")
        if now > max(self.heard_at, self._asked_at) + seconds / 4:
            self._asked_at = now
            await self.transmit(Ping(next(self._requests)))

    async def _take_all(self, packets: Sequence[Packet]) -> None:
        now = time.monotonic()
        for packet in packets:
            self._take(packet, now)
        with trio.CancelScope(shield=True):  # half a frame would break the connection
            for packet in packets:
                if isinstance(packet, Ping):
                    await self.transmit(Pong(packet.request))

    def _take(self, packet: Packet, now: float) -> None:
        if self.transacting.take(packet, now):
            return
        match packet:
            case Deliver():
                self._take_deliver(packet, now)
            case Receipts():
                self._take_receipts(packet, now)
            case Settled():
                tags = self._settling.pop(packet.request)
                stale = {
                    tag
                    for first, last in zip(packet.stale[::2], packet.stale[1::2], strict=True)
                    for tag in range(first, last + 1)
                }
                self.stale |= stale
                self._history.write(*(SettleOk(now, self.name, tag, tag in stale) for tag in tags))
            case Refusal():
                self._take_refusal(packet, now)
            case Goodbye():
                self.left = True
            case AdminReply():
                self._answers[packet.request] = packet.result
            case _:
                pass

    def _take_deliver(self, packet: Deliver, now: float) -> None:
        for offset, blob in enumerate(packet.messages):
            attempt = packet.attempts if isinstance(packet.attempts, int) else packet.attempts[offset]
            tag, identity = packet.first_tag + offset, blob[:16].hex()
            self._history.write(Delivered(now, self.name, self.group, tag, identity, attempt, self.digest(blob)))
            self._arrived.append(Arrival(tag, identity, attempt, blob))

    def _take_receipts(self, packet: Receipts, now: float) -> None:
        exceptions = {item[0]: item[1] for item in packet.exceptions}
        for index, call in enumerate(self._publishing.pop(packet.request)):
            code = exceptions.get(index)
            groups = packet.groups if isinstance(packet.groups, int) else packet.groups[index]
            if code is None or code in {RECEIPT_DUPLICATE, RECEIPT_DELAYED}:
                known = None if code else groups
                self._note_receipt(PublishOk(now, call, known, code == RECEIPT_DUPLICATE, packet.durable))
            else:
                self._note_receipt(PublishRefused(now, call, code))

    def _take_refusal(self, packet: Refusal, now: float) -> None:
        if packet.request in self._publishing:
            for call in self._publishing.pop(packet.request):
                self._note_receipt(PublishRefused(now, call, packet.code))
        elif packet.request:
            self._settling.pop(packet.request, None)
            self._answers[packet.request] = packet

    def _note_receipt(self, receipt: PublishOk | PublishRefused) -> None:
        self._history.write(receipt)
        self.receipts[receipt.call] = receipt

    # --- what a client does -------------------------------------------------------------------

    async def publish(self, messages: Sequence[Message]) -> list[str]:
        """Send messages in one frame; return their calls, whose receipts come with `receive`."""
        request, calls = next(self._requests), [str(next(_calls)) for _ in messages]
        now = time.monotonic()
        for call, message in zip(calls, messages, strict=True):
            digest = digest_of(message.encoded())
            self._history.write(
                PublishInvoked(
                    now, call, self.group, message.id.hex(), message.topic, message.message_type, digest,
                    message.deliver_limit, message.delay or 0.0,
                )
            )  # fmt: skip
        self._publishing[request] = calls
        await self.transmit(Publish(request, [message.encoded() for message in messages]))
        return calls

    async def ack(self, tags: Sequence[int]) -> None:
        """Acknowledge deliveries in one frame."""
        self._note_settling(request := next(self._requests), tags, "ack")
        ranges: list[int] = []
        for tag in sorted(tags):
            if ranges and ranges[-1] == tag - 1:
                ranges[-1] = tag
            else:
                ranges += (tag, tag)
        await self.transmit(Ack(request, ranges))

    async def nack(self, tags: Sequence[int], how: int = NACK_FAILED, after_ms: int | None = None) -> None:
        """Refuse deliveries in one frame."""
        self._note_settling(request := next(self._requests), tags, HOW[how])
        await self.transmit(Nack(request, [[tag, how, after_ms, "the test says so"] for tag in tags]))

    def _note_settling(self, request: int, tags: Sequence[int], how: str) -> None:
        now = time.monotonic()
        self._settling[request] = list(tags)
        self._history.write(*(Settling(now, self.name, tag, how) for tag in tags))

    async def extend(self, tags: Sequence[int]) -> None:
        """Ask for more time for deliveries."""
        now = time.monotonic()
        self._history.write(*(Extended(now, self.name, tag) for tag in tags))
        await self.transmit(Extend(next(self._requests), [bound for tag in sorted(tags) for bound in (tag, tag)]))

    async def credit(self, window: int) -> None:
        """Say how many deliveries this connection holds at most."""
        await self.transmit(Credit(next(self._requests), window))

    async def answered(self, timeout: float = ANSWER_SECONDS_MAX) -> None:
        """Wait until everything sent has its answer; messages that come meanwhile are kept for `receive`."""
        kept: list[Arrival] = []
        try:
            with trio.fail_after(timeout):
                while self.unanswered:
                    kept += await self.receive()
        except trio.TooSlowError as error:
            await self.drop()
            raise Lost("no answer in time") from error
        self._arrived = kept + self._arrived

    async def admin(self, verb: str, **arguments: object) -> Any:
        """Return the result of an administrative request."""
        request = next(self._requests)
        await self.transmit(Admin(request, verb, arguments))
        kept: list[Arrival] = []
        with trio.fail_after(ANSWER_SECONDS_MAX):
            while request not in self._answers:
                kept += await self.receive()
        self._arrived = kept + self._arrived
        answer = self._answers.pop(request)
        assert not isinstance(answer, Refusal), f"{verb} was refused: {answer}"
        return answer

    async def goodbye(self) -> None:
        """Leave as a well-behaved client does."""
        if self.open:
            # Noted before it is sent: another member may get what is given back before this task goes on.
            self._note_end("goodbye")
            self.open = False
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.CancelScope(shield=True):
                await self._stream.send_all(encode_packet(Goodbye(next(self._requests), "done")))
                await self._stream.aclose()

    async def drop(self) -> None:
        """Leave as a client does whose machine is switched off."""
        await self._end("dropped")

    async def _end(self, how: str) -> None:
        if self.open:
            self._note_end(how)
            self.open = False
            with trio.CancelScope(shield=True):
                await self._stream.aclose()

    def _note_end(self, how: str) -> None:
        now = time.monotonic()
        self._history.write(Ended(now, self.name, how))
        for calls in self._publishing.values():
            self._history.write(*(PublishUnknown(now, call) for call in calls))
        self._publishing.clear()
        self._settling.clear()
        self.transacting.forget()
