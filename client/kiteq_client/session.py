"""One accepted connection to a broker, until the goodbye.

Theory of operation. One task reads and hands each packet to a method named after it, synchronously; one
task writes everything that is queued in one piece; one keeps the connection and what is held alive.
Nothing here waits for a handler, so no handler can stop the reading. Whatever goes wrong ends in `run`
returning the reason in words.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Final

import anyio
from anyio.abc import ByteStream

from kiteq.errors import NotConnected, ProtocolError, RemoteProtocolError, refusal
from kiteq.limits import (
    ACK_DEADLINE_SECONDS,
    BODY_BYTES_MAX_DEFAULT,
    HEARTBEAT_SECONDS,
    IDLE_SECONDS_MAX,
    READ_BYTES,
)
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import (
    Admin,
    AdminReply,
    Ask,
    Brokers,
    Credit,
    Decided,
    Deliver,
    Extend,
    Goodbye,
    Packet,
    Ping,
    Pong,
    Prepared,
    Publish,
    Receipts,
    Refusal,
    Settled,
    Subscribe,
    Subscribed,
    Unsubscribe,
    Welcome,
)
from kiteq_client.incoming import Answers, Batch, to_ranges
from kiteq_client.requests import Requests
from kiteq_client.shared import Owner, Shared
from kiteq_client.signal import Signal
from kiteq_client.unanswered import DRAINING

__all__ = ["Session"]

logger = logging.getLogger("kiteq_client")

LEAVE_POLL_SECONDS: Final = 0.005
"""How often a connection that ends looks whether everything is answered; only then is it polled."""
LINGER_SECONDS: Final = 0.5
"""How long a connection that said goodbye waits for the broker to close it."""
FLUSH_SECONDS: Final = 0.002
"""How long acks wait for others to share their frame."""

_BROKEN = (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, OSError)


class Session:
    """One accepted connection.

    stream, decoder: connected, and greeted with `welcome`. owner: keeps request numbers and unanswered messages
    across connections. told: called with the addresses of the broker's set.
    """

    def __init__(
        self,
        stream: ByteStream,
        decoder: Decoder,
        welcome: Welcome,
        owner: Owner,
        shared: Shared,
        told: Callable[[list[str]], None],
    ) -> None:
        self.alive = True
        self.leaving = False
        self.reason = ""
        self.broker = welcome.broker
        self.answers = Answers(max(1, shared.prefetch // 2), self._answers_pending, shared.counters)
        self.goodbye = anyio.Event()
        self.is_writing = False
        self._stream = stream
        self._decoder = decoder
        self._version = welcome.version
        self._owner = owner
        self._shared = shared
        self._told = told
        self._unanswered = owner.unanswered
        self._sent = (owner.unanswered, owner.preparing, owner.deciding)
        self._requests = Requests(shared.timeout)
        self._control: list[bytes] = []
        self._wake = Signal()
        self._flush = Signal()
        self._scope = anyio.CancelScope()
        limits = welcome.limits
        self._body_bytes_max = limits.get("body_bytes", BODY_BYTES_MAX_DEFAULT)
        decoder.frame_bytes_max = limits.get("frame_bytes", decoder.frame_bytes_max)
        self._heartbeat_s = limits.get("heartbeat_ms", HEARTBEAT_SECONDS * 1000) / 1000
        self._idle_s = limits.get("idle_ms", IDLE_SECONDS_MAX * 1000) / 1000
        self._extend_s = limits.get("ack_deadline_ms", ACK_DEADLINE_SECONDS * 1000) / 3000
        self._sent_at = self._received_at = anyio.current_time()
        self._said_goodbye = self._finished = False

    # --- the life ------------------------------------------------------------------------------
    async def run(self, first: list[Packet]) -> str:
        """Carry packets, `first` those that came with the greeting, until the connection ends; return why it ended."""
        try:
            for frame in self._unanswered.again():
                self._control.append(encode_packet(Publish(frame.request, frame.blobs)))
            self._control += map(encode_packet, self._owner.preparing.unanswered())
            self._wake.set()
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    for work in (self._write, self._flush_answers, self._keep_alive):
                        tasks.start_soon(self._ending_with_reason, work)
                    await self._ending_with_reason(partial(self._read, first))
        finally:
            self.alive = self.is_writing = False
            self._control = []
            self._shared.incoming.drop(self)
            self._requests.refuse_all(NotConnected(f"the connection to {self.broker} was lost: {self.reason}"))
        return self.reason

    async def _ending_with_reason(self, work: Callable[[], Any]) -> None:
        """Run one task of the connection; whichever ends first ends the others."""
        try:
            reason = await work()
        except ProtocolError as error:
            reason = str(error)
            self._control.append(encode_packet(Refusal(0, "bad_frame", reason[:200], temporary=False)))
            self.leaving = self._finished = True
            self._wake.set()
            with anyio.move_on_after(1):
                await self._wait_written()
        except _BROKEN as error:
            reason = "the broker closed the connection" if isinstance(error, anyio.EndOfStream) else str(error)
            reason = reason or "the connection broke"
        self.reason = self.reason or reason
        self._scope.cancel()

    async def _read(self, first: list[Packet]) -> str:
        stream, decoder = self._stream, self._decoder
        self._dispatch(first)
        while True:
            chunk = await stream.receive(READ_BYTES)
            self._received_at = anyio.current_time()
            self._dispatch(decoder.feed(chunk))

    async def _write(self) -> str:
        while True:
            await self._wake.wait()
            await self._send_queued()

    async def _send_queued(self) -> None:
        """Send all that is queued, one piece at a time, until nothing is."""
        while True:
            pieces, self._control = self._control, []
            if self.alive and not self._said_goodbye:
                self._take_transactional(pieces)
            if self.alive and not self.leaving:
                while (frame := self._owner.take(self._body_bytes_max)) is not None:
                    self._unanswered.add(request := self._owner.next_request(), frame)
                    pieces.append(encode_packet(Publish(request, frame.blobs)))
            if not pieces:
                return
            self.is_writing = True
            await self._stream.send(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            self.is_writing = False
            self._sent_at = anyio.current_time()

    def _take_transactional(self, pieces: list[bytes]) -> None:
        """Half messages go before others, and decisions after what was added to their transactions."""
        owner = self._owner
        if not self.leaving and owner.preparing.waiting:
            pieces += map(encode_packet, owner.preparing.take(owner.next_request, self._body_bytes_max))
        pieces += map(encode_packet, owner.deciding.take(owner.next_request))

    async def _flush_answers(self) -> str:
        while True:
            await self._flush.wait()
            await anyio.sleep(FLUSH_SECONDS)
            self.flush()

    async def _keep_alive(self) -> str:
        """Extend what is held, say something when idle, notice a peer that says nothing."""
        tick_s = min(self._heartbeat_s, self._extend_s, self._idle_s) / 4
        extended_at = anyio.current_time()
        while True:
            await anyio.sleep(tick_s)
            now = anyio.current_time()
            if now - self._received_at > self._idle_s:
                return f"the broker said nothing for {self._idle_s:g} s"
            if now - extended_at >= self._extend_s - tick_s:
                extended_at = now
                held = to_ranges(self._shared.held_tags(self), self._shared.incoming.queued_ranges(self))
                if held:
                    self.send(Extend(self._owner.next_request(), held))
            if now - min(self._sent_at, self._received_at) >= self._heartbeat_s - tick_s:
                self.send(Ping(self._owner.next_request()))

    # --- what arrives --------------------------------------------------------------------------
    def _dispatch(self, packets: list[Packet]) -> None:
        for packet in packets:
            kind = type(packet)
            if kind is Receipts:
                count = self._unanswered.answer(packet, self.broker, monotonic())  # type: ignore[arg-type]
                self._shared.counters.sent += count
                if not count:
                    logger.warning("%s sent receipts for an unknown request", self.broker)
            elif kind is Deliver:
                self._deliver(packet)  # type: ignore[arg-type]
            elif kind is Prepared:
                self._owner.preparing.answer(packet, self.broker)  # type: ignore[arg-type]
            elif kind is Decided:
                self._owner.deciding.answer(packet)  # type: ignore[arg-type]
            elif kind is Ask:
                self._owner.asked(packet)  # type: ignore[arg-type]
            elif kind is Settled:
                self.answers.settled(packet.request, packet.stale)  # type: ignore[union-attr]
            elif kind is Ping:
                self.send(Pong(packet.request))
            elif kind is Refusal:
                self._refused(packet)  # type: ignore[arg-type]
            elif kind is Subscribed or kind is AdminReply:
                self._requests.answer(packet.request, packet.result if type(packet) is AdminReply else None)
            elif kind is Goodbye:
                self._broker_leaves(packet.reason)  # type: ignore[union-attr]
            elif kind is Brokers and self._version > 1:
                self._told(packet.addresses)  # type: ignore[union-attr]
            elif kind is not Pong:
                raise RemoteProtocolError(f"a broker must not send {kind.__name__}")

    def _broker_leaves(self, reason: str) -> None:
        """Begin nothing more here: the owner ends the connection when nothing is open."""
        if not self.goodbye.is_set():
            logger.info("%s says goodbye: %s", self.broker, reason)
            self.leaving = True
            # What is not begun would hold up the broker, and be cut off in the middle of a message.
            incoming = self._shared.incoming
            for first, last in incoming.queued_ranges(self):
                self.hand_back(first, last)
            incoming.drop(self)
            self.goodbye.set()
            self.reason = self.reason or f"the broker said goodbye: {reason}"

    def _deliver(self, packet: Deliver) -> None:
        if type(packet.attempts) is list and len(packet.attempts) != len(packet.messages):
            raise RemoteProtocolError("Deliver.attempts does not have one item per message")
        if self._shared.incoming.accepting:
            self._shared.incoming.put(Batch(self, packet))
        else:
            self.hand_back(packet.first_tag, packet.first_tag + len(packet.messages) - 1)

    def _refused(self, packet: Refusal) -> None:
        error = refusal(packet.code, packet.reason, packet.temporary)
        if packet.request == 0:
            self.reason = f"the broker ended the connection: {error}"
        elif self._requests.refuse(packet.request, error):
            return
        elif packet.request in self.answers.unsettled:
            self.answers.settled(packet.request, [])
            logger.warning("%s refused an ack or nack: %s", self.broker, error)
        else:
            if packet.code == DRAINING:
                self._broker_leaves(packet.reason)
            elif packet.temporary:
                self._owner.refused_at = monotonic()
            if not any(part.refuse(packet.request, error) for part in self._sent):
                logger.warning("%s refused: %s", self.broker, error)

    # --- what is asked of it -------------------------------------------------------------------
    @property
    def takes_messages(self) -> bool:
        """Whether new messages may be sent here."""
        return self.alive and not self.leaving

    @property
    def is_woken(self) -> bool:
        """Whether it is about to look for something to send."""
        return self._wake.is_set and not self.is_writing

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def send(self, packet: Packet) -> None:
        """Queue a packet; it leaves with all that is queued. Nothing follows a goodbye."""
        if self._finished:
            return
        self._control.append(encode_packet(packet))
        self._wake.set()

    def grant(self, window: int) -> None:
        """Let the broker have this many messages unacked here."""
        if self.alive:
            self.send(Credit(self._owner.next_request(), window))

    def flush(self) -> None:
        """Send the acks and nacks collected so far."""
        if self.answers.count and self.alive:
            for packet in self.answers.flush(self._owner.next_request):
                self.send(packet)

    def ack(self, tag: int) -> bool:
        """Answer a delivery: done. Return whether the caller should let other tasks run now."""
        if self.alive and self.answers.ack(tag):
            self.flush()
            return True
        return False

    def nack(self, tag: int, how: int, after_ms: int | None, error: str) -> bool:
        """Answer a delivery: failed, rejected or handed back. Return as `ack` does."""
        if self.alive and self.answers.nack(tag, how, after_ms, error):
            self.flush()
            return True
        return False

    def hand_back(self, first: int, last: int) -> None:
        """Answer deliveries that nobody started."""
        if self.alive:
            self.answers.hand_back(first, last)
            self.flush()

    def _answers_pending(self) -> None:
        self._flush.set()

    async def ask(self, make: Callable[[int], Subscribe | Unsubscribe | Admin]) -> Any:
        """Send a request and return its result. Raises its refusal, `SendTimeout` or `NotConnected`."""
        number = self._owner.next_request()
        return await self._requests.ask(number, lambda: self.send(make(number)), self.broker)

    @property
    def is_quiet(self) -> bool:
        """Whether nobody waits for an answer, and everything delivered is answered and confirmed."""
        return not (
            self._unanswered.is_awaited
            or self._owner.preparing.is_open
            or self._owner.deciding.is_open
            or self._requests.is_open
            or self.answers.count
            or self.answers.unsettled
            or self._control
            or self.is_writing
            or self._shared.held_tags(self)
            or self._shared.incoming.queued_ranges(self)
        )

    def abandon(self, why: str) -> None:
        """End the connection without a goodbye: there is nobody at the other end."""
        self.reason = self.reason or why
        self._scope.cancel()

    async def wait_quiet(self) -> None:
        """Return when nothing is open any more, or when the connection ended."""
        while self.alive and not self.is_quiet:
            self.flush()
            await anyio.sleep(LEAVE_POLL_SECONDS)

    async def leave(self) -> None:
        """Say goodbye, which gives back what is unacked, and end the connection; once, whoever asks for it."""
        if self.alive and not self._said_goodbye:
            self.flush()
            self.reason = self.reason or "the client left"
            self.leaving = self._said_goodbye = True
            self.send(Goodbye(self._owner.next_request(), "leaving"))
            self._finished = True
            await self._wait_written()
            # Closing with bytes unread would reset the connection, and lose the goodbye.
            try:
                await self._stream.send_eof()
            except _BROKEN as error:
                logger.debug("%s was gone before the goodbye: %s", self.broker, error)
        with anyio.move_on_after(LINGER_SECONDS):
            while self.alive:  # noqa: ASYNC110 the same
                await anyio.sleep(LEAVE_POLL_SECONDS)
        self._scope.cancel()

    async def _wait_written(self) -> None:
        while self._control or self.is_writing:  # noqa: ASYNC110 only at the end, not per piece
            await anyio.sleep(LEAVE_POLL_SECONDS)
