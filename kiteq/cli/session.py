"""A short connection to a running broker for administrative requests, with blocking calls."""

from __future__ import annotations

import os
import socket
from collections import deque
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


Answer = TypeVar("Answer", Welcome, AdminReply)


class AdminSession:
    """Use it as `with AdminSession("127.0.0.1:13800") as broker: broker.ask("stat")`.

    Raises `NotConnected` when no broker answers there, `Refused` when it says no.
    """

    def __init__(self, address: str) -> None:
        self._address = address.removeprefix("kiteq://")
        self._decoder = Decoder(limits.HELLO_FRAME_BYTES_MAX)
        self._arrived: deque[Packet] = deque()
        self._request = 1

    def __enter__(self) -> Self:
        try:
            host, port = split_address(self._address)
        except ValueError as error:
            raise CommandFailed(f"--broker is {self._address!r}; it must be {error}", STATUS_USAGE) from None
        try:
            self._socket = socket.create_connection((host, port), limits.SEND_TIMEOUT_SECONDS)
        except OSError as error:
            reason = error.strerror or str(error)
            raise NotConnected(
                f"no broker answers at {self._address}: {reason.lower()}; is one running there?"
            ) from error
        try:
            welcome = self._exchange(
                Hello(1, PROTOCOL, list(WIRE_VERSIONS), os.urandom(16), GROUP, [], [], 0, 1), Welcome
            )
            self._decoder.frame_bytes_max = welcome.limits.get("frame_bytes", limits.HELLO_FRAME_BYTES_MAX)
            self._socket.settimeout(ANSWER_SECONDS_MAX)
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def ask(self, verb: str, **arguments: Any) -> Any:
        """Send a request and return its result; arguments that are None are left out."""
        self._request += 1
        said = {name: value for name, value in arguments.items() if value is not None}
        return self._exchange(Admin(self._request, verb, said), AdminReply).result

    def _exchange(self, packet: Packet, expected: type[Answer]) -> Answer:
        try:
            self._socket.sendall(encode_packet(packet))
            while True:
                answer = self._next()
                if isinstance(answer, Ping):
                    self._socket.sendall(encode_packet(Pong(answer.request)))
                elif isinstance(answer, Refusal) and answer.request in (0, packet.request):
                    raise errors.refusal(answer.code, answer.reason, answer.temporary)
                elif isinstance(answer, expected) and answer.request == packet.request:
                    return answer
        except errors.RemoteProtocolError as error:
            raise NotConnected(f"what answers at {self._address} is no kiteq broker: {error}") from error
        except TimeoutError as error:
            raise NotConnected(f"the broker at {self._address} does not answer in time") from error
        except OSError as error:
            raise NotConnected(f"the connection to {self._address} broke: {error.strerror or error}") from error

    def _next(self) -> Packet:
        while not self._arrived:
            chunk = self._socket.recv(limits.READ_BYTES)
            if not chunk:
                raise ConnectionResetError("the broker closed the connection")
            self._arrived.extend(self._decoder.feed(chunk))
        return self._arrived.popleft()
