"""Carries one connection: bytes from the socket to the pipeline, queued bytes to the socket.

Reading and sending use the non-blocking socket directly: with trio's stream each costs four times as
much (9.9 against 2.2 us). A send is tried at once at the end of a turn; only what the socket does not
take waits for the session's writer task.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import trio

from kiteq.errors import RemoteProtocolError
from kiteq.limits import (
    HELLO_FRAME_BYTES_MAX,
    IDLE_SECONDS_MAX,
    IN_FLIGHT_BYTES_MAX,
    OUTBOX_BYTES_MAX,
    READ_BYTES,
    UNAUTHENTICATED_SECONDS_MAX,
    UNCOMMITTED_BYTES_MAX,
    WRITE_STALL_SECONDS_MAX,
)
from kiteq.remoting.codec import Decoder

if TYPE_CHECKING:
    from kiteq.remoting.packets import Packet

__all__ = ["BROKEN", "CLOSED", "Session", "SessionPeer"]

CLOSED: Final = "the client closed the connection"
BROKEN: Final = "the connection broke"
"""How the reason of a connection that the other side has ended begins."""

SMALL_READ_BYTES: Final = 8 * 1024
"""After a smaller read the reader waits for its commit: what arrives meanwhile makes the next one larger."""
SMALL_READ_SPACING_SECONDS: Final = 0.00175
"""And when something did arrive meanwhile, small reads of one connection come at most this often."""
READ_BYTES_FIRST: Final = 16 * 1024
"""A buffer of this size is cheap to allocate; it grows with what the peer sends."""
ANSWER_CHECK_SECONDS: Final = 1.0
"""While the answer to a greeting takes long, its connection is looked at this often."""


class SessionPeer(Protocol):
    """What a session must know of the peer it serves."""

    accepted: bool
    group: str
    outbox: list[bytes]
    outbox_bytes: int
    uncommitted_bytes: int
    close_reason: str | None

    def refuse(self, code: str, reason: str) -> None:
        """Tell the peer why the connection ends."""

    def close(self, reason: str) -> None:
        """End the connection."""


class Session:
    """One accepted socket and its peer.

    read: called with the packets of each socket read; runs the pipeline and ends the turn.
    frame_bytes_max: once the peer was accepted; before, HELLO_FRAME_BYTES_MAX holds.
    """

    def __init__(
        self, sock: socket.socket, peer: SessionPeer, read: Callable[[list[Packet]], None], frame_bytes_max: int
    ) -> None:
        self._sock = sock
        self._peer = peer
        self._read = read
        self._frame_bytes_max = frame_bytes_max
        self._outbox_bytes_max = OUTBOX_BYTES_MAX + IN_FLIGHT_BYTES_MAX + frame_bytes_max
        self._decoder = Decoder(HELLO_FRAME_BYTES_MAX)
        self._unsent = b""
        self._stalled = trio.Event()
        self._scope = trio.CancelScope()
        self._stored = trio.Event()
        self._uncommitted_wanted = 0
        self._awaits_commit = False
        self._sends_ahead = False
        """Whether something had arrived before the last answers were sent: the peer does not wait for them."""
        self.last_heard = trio.current_time()

    def flush(self) -> None:
        """Send what is queued as far as the socket takes it; the writer task does the rest."""
        peer = self._peer
        if peer.outbox:
            queued = b"".join(peer.outbox) if len(peer.outbox) > 1 else peer.outbox[0]
            peer.outbox.clear()
            self._unsent = self._unsent + queued if self._unsent else queued
            if self._awaits_commit:
                self._sends_ahead = self._is_readable()
                self._awaits_commit = False
            if not self._stalled.is_set():
                self._send_now()
            peer.outbox_bytes = len(self._unsent)
            if peer.outbox_bytes > self._outbox_bytes_max and peer.close_reason is None:
                peer.close(f"slow_peer: more than {self._outbox_bytes_max} bytes wait to be sent to it")
                self._unsent = b""
        if self._unsent:
            self._stalled.set()
        elif peer.close_reason is not None:
            self._scope.cancel()
        if peer.uncommitted_bytes <= self._uncommitted_wanted:
            self._stored.set()

    def _send_now(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self._peer.close(f"sending failed: {error.strerror}")
            self._unsent = b""
            return
        self._unsent = self._unsent[sent:] if sent < len(self._unsent) else b""

    async def run(self) -> None:
        """Serve the connection until it ends; the reason is in `peer.close_reason`."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_stalled)
                nursery.start_soon(self._watch_idle)
                await self._read_on()
                nursery.cancel_scope.cancel()
        if self._unsent:
            with trio.move_on_after(1, shield=True):
                while self._unsent:
                    self._send_now()
                    await trio.lowlevel.wait_writable(self._sock)

    async def _read_on(self) -> None:
        sock, peer = self._sock, self._peer
        size = READ_BYTES_FIRST
        while peer.close_reason is None:
            await trio.lowlevel.wait_readable(sock)
            try:
                chunk = sock.recv(size)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                peer.close(f"{BROKEN}: {errno.errorcode.get(error.errno or 0, 'unknown')}")
                return
            if not chunk:
                peer.close(CLOSED)
                return
            if len(chunk) == size and size < READ_BYTES:
                size *= 2
            read_at = trio.current_time()
            self._feed(chunk)
            if len(chunk) >= SMALL_READ_BYTES:
                await self._until_uncommitted(UNCOMMITTED_BYTES_MAX)
            elif peer.uncommitted_bytes:
                await self._until_uncommitted(0)
                if self._sends_ahead:
                    await trio.sleep_until(read_at + SMALL_READ_SPACING_SECONDS)

    async def _until_uncommitted(self, most_bytes: int) -> None:
        """Wait until at most so many bytes of this peer's are in the store's queue."""
        while self._peer.uncommitted_bytes > most_bytes and self._peer.close_reason is None:
            self._uncommitted_wanted = most_bytes
            self._awaits_commit = True
            self._stored = trio.Event()
            await self._stored.wait()

    def _is_readable(self) -> bool:
        """Return whether more has arrived."""
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _feed(self, chunk: bytes) -> None:
        peer = self._peer
        if peer.accepted:
            self._decoder.frame_bytes_max = self._frame_bytes_max
        try:
            packets = self._decoder.feed(chunk)
        except RemoteProtocolError as error:
            peer.refuse("bad_frame", str(error))
            self._read([])
            return
        self.last_heard = trio.current_time()
        if packets:
            self._read(packets)

    async def _watch_idle(self) -> None:
        """End a connection that never greets, or falls silent."""
        await trio.sleep(UNAUTHENTICATED_SECONDS_MAX)
        if not self._peer.group:
            self._peer.refuse("not_authenticated", f"no valid greeting within {UNAUTHENTICATED_SECONDS_MAX:g} seconds")
            self._read([])
        while not self._peer.accepted:
            self.last_heard = trio.current_time()  # it waits for the answer and may not send before
            await trio.sleep(ANSWER_CHECK_SECONDS)
        while True:
            silent = trio.current_time() - self.last_heard
            if silent >= IDLE_SECONDS_MAX:
                self._peer.refuse("idle", f"nothing was heard for {IDLE_SECONDS_MAX:g} seconds")
                self._read([])
            await trio.sleep(max(0.1, IDLE_SECONDS_MAX - silent))

    async def _write_stalled(self) -> None:
        """Send what the socket did not take at once."""
        while True:
            await self._stalled.wait()
            while self._unsent:
                with trio.move_on_after(WRITE_STALL_SECONDS_MAX) as patience:
                    await trio.lowlevel.wait_writable(self._sock)
                if patience.cancelled_caught:
                    self._unsent = b""
                    self._peer.close(f"slow_peer: it took nothing for {WRITE_STALL_SECONDS_MAX:g} seconds")
                    break
                self._send_now()
                self._peer.outbox_bytes = len(self._unsent)
            self._stalled = trio.Event()
            self.flush()
