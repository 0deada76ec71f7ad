"""A short connection to a running broker for administrative requests, with blocking calls."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from kiteq import errors, limits
from kiteq.cli.failing import STATUS_USAGE, CommandFailed
from kiteq.errors import NotConnected
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import (
    PROTOCOL,
    WIRE_VERSIONS,
    Admin,
    AdminReply,
    Brokers,
    Hello,
    Packet,
    Ping,
    Pong,
    Refusal,
    Welcome,
)
from kiteq.values import split_address

__all__ = ["GROUP", "AdminSession"]

GROUP: Final = "kiteq-cli"
"""The group as which the command line connects."""
ANSWER_SECONDS_MAX: Final = 30.0
"""Dropping a large group takes the broker a while."""
UNKNOWN_VERB: Final = "unknown_verb"


Answer = TypeVar("Answer", Welcome, AdminReply, Pong)


class AdminSession:
    """Use it as `with AdminSession("127.0.0.1:13800") as broker: broker.ask("stat")`.

    address: HOST:PORT. It connects anew for a request that comes after a long pause.
    broker_id, neighbours: the broker's own, and the addresses of the set it belongs to, if any.
    Raises `NotConnected` when no broker answers there, `Refused` when it says no.
    """

    def __init__(
        self,
        address: str,
        *,
        connect_seconds: float = limits.SEND_TIMEOUT_SECONDS,
        answer_seconds: float = ANSWER_SECONDS_MAX,
    ) -> None:
        self.address = address
        self.broker_id = ""
        self.neighbours: list[str] = []
        self._connect_seconds = connect_seconds
        self._answer_seconds = answer_seconds
        self._request = 1

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect, and learn who the broker is."""
        self._decoder = Decoder(limits.HELLO_FRAME_BYTES_MAX)
        self._arrived: deque[Packet] = deque()
        self._used_at = time.monotonic()
        try:
            self._host, port = split_address(self.address)
        except ValueError as error:
            raise CommandFailed(f"--broker is {self.address!r}; it must be {error}", STATUS_USAGE) from None
        try:
            self._socket = socket.create_connection((self._host, port), self._connect_seconds)
        except OSError as error:
            reason = error.strerror or str(error)
            raise NotConnected(
                f"no broker answers at {self.address}: {reason.lower()}; is one running there?"
            ) from error
        try:
            welcome = self._exchange(
                Hello(1, PROTOCOL, list(WIRE_VERSIONS), os.urandom(16), GROUP, [], [], 0, 1), Welcome
            )
            self.broker_id = welcome.broker
            self._decoder.frame_bytes_max = welcome.limits.get("frame_bytes", limits.HELLO_FRAME_BYTES_MAX)
            if welcome.version > 1:
                self._ping()  # the addresses of the set stand between the greeting and this answer
            self._socket.settimeout(self._answer_seconds)
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """End the connection; what another thread waits for ends with an error."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def wait_gone(self) -> None:
        """Wait until the broker has ended this connection."""
        self._socket.settimeout(limits.HEARTBEAT_SECONDS)
        with suppress(OSError, errors.RemoteProtocolError):
            while True:
                try:
                    self._next()
                except TimeoutError:
                    self._request += 1
                    self._socket.sendall(encode_packet(Ping(self._request)))

    def _ping(self) -> None:
        self._request += 1
        self._exchange(Ping(self._request), Pong)

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Send a request and return its result; arguments that are None are left out."""
        if time.monotonic() - self._used_at > limits.HEARTBEAT_SECONDS:  # a broker ends what is silent for long
            self.close()
            self.open()
        self._request += 1
        said = {name: value for name, value in arguments.items() if value is not None}
        try:
            return self._exchange(Admin(self._request, verb, said), AdminReply).result
        except errors.Refused as error:
            if error.code != UNKNOWN_VERB:
                raise
            reason = (
                f"the broker at {self.address} is of another version and does not know {verb!r}: upgrade the older one"
            )
            raise errors.refusal(UNKNOWN_VERB, reason) from error

    def _exchange(self, packet: Packet, expected: type[Answer]) -> Answer:
        self._used_at = time.monotonic()
        try:
            self._socket.sendall(encode_packet(packet))
            while True:
                answer = self._next()
                if isinstance(answer, Ping):
                    self._socket.sendall(encode_packet(Pong(answer.request)))
                elif isinstance(answer, Brokers):
                    self.neighbours = [self._beside(address) for address in answer.addresses]
                elif isinstance(answer, Refusal) and answer.request in (0, packet.request):
                    raise errors.refusal(answer.code, answer.reason, answer.temporary)
                elif isinstance(answer, expected) and answer.request == packet.request:
                    return answer
        except errors.RemoteProtocolError as error:
            raise NotConnected(f"what answers at {self.address} is no kiteq broker: {error}") from error
        except TimeoutError as error:
            raise NotConnected(f"the broker at {self.address} does not answer in time") from error
        except OSError as error:
            raise NotConnected(f"the connection to {self.address} broke: {error.strerror or error}") from error

    def _beside(self, address: str) -> str:
        """Return HOST:PORT for an address of a set; ":PORT" is on the host that was connected to."""
        if not address.startswith(":"):
            return address
        return f"[{self._host}]{address}" if ":" in self._host else f"{self._host}{address}"

    def _next(self) -> Packet:
        while not self._arrived:
            chunk = self._socket.recv(limits.READ_BYTES)
            if not chunk:
                raise ConnectionResetError("the broker closed the connection")
            self._arrived.extend(self._decoder.feed(chunk))
        return self._arrived.popleft()
