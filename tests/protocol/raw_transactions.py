"""Transactions over the wire, written from doc/protocol.md alone: what the client beside this module leaves out."""

import os
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgpack

from tests.protocol.raw_client import HELLO, PING, PONG, REFUSAL, WELCOME, RawClient, RefusedError

PREPARE, PREPARED, ENLIST, DECIDE, DECIDED, ASK, ADMIN, ADMIN_REPLY = 32, 33, 34, 35, 36, 37, 48, 49
ROLLBACK, COMMIT, UNKNOWN, RUNNING = 0, 1, 2, 3


class Question(NamedTuple):
    """One transaction of an `Ask`: how often it was asked about, its token, its first message."""

    attempt: int
    token: bytes
    message: bytes


def frame(*packet: object) -> bytes:
    """Return a packet as it travels."""
    data: bytes = msgpack.packb(packet)
    return len(data).to_bytes(4, "big") + data


def tokens_of(handles: int | list[int], transactions: Iterable[list[bytes]]) -> list[bytes]:
    """Return the token of each prepared transaction; the id alone of one that was refused."""
    ids = [messages[0][:16] for messages in transactions]
    numbers = range(handles, handles + len(ids)) if isinstance(handles, int) else handles
    return [one + (number.to_bytes(8, "big") if number else b"") for one, number in zip(ids, numbers, strict=True)]


class TransactionClient(RawClient):
    """One connection of a program that prepares, decides and is asked."""

    def __init__(self, host: str, port: int, instance: bytes | None = None) -> None:
        super().__init__(host, port)
        self.instance = instance or os.urandom(16)
        self._questions: deque[Question] = deque()

    def join(self, group: str, *topics: str, bound: tuple[str, ...] = ()) -> None:
        """Say hello as a publisher of `topics`; consume every type of the topics `bound`."""
        bindings = [[topic, 2, "*", None, True, "latest"] for topic in bound]
        hello = ("kiteq", [1], self.instance, group, topics, bindings, 0, 1)
        self.limits = self.ask(HELLO, *hello, answer=WELCOME)[2]
        if bound:
            self.grant(1_000)

    def prepare(self, *transactions: list[bytes], check_after_ms: int = 0) -> tuple[list[bytes], list[list[Any]]]:
        """Store transactions; return the token of each, and the exceptions."""
        messages = [message for one in transactions for message in one]
        sizes = [len(one) for one in transactions]
        handles, exceptions = self.ask(PREPARE, messages, sizes, check_after_ms, answer=PREPARED)[:2]
        return tokens_of(handles, transactions), exceptions

    def prepare_one(self, *messages: bytes, check_after_ms: int = 0) -> bytes:
        """Store one transaction; return its token."""
        [token], exceptions = self.prepare([*messages], check_after_ms=check_after_ms)
        if exceptions:
            raise RefusedError(*exceptions[0][1:])
        return token

    def enlist(self, token: bytes, *messages: bytes) -> list[list[Any]]:
        """Add messages to a transaction; return the exceptions."""
        return list(self.ask(ENLIST, token, messages, answer=PREPARED)[1])

    def decide(self, decision: int, *tokens: bytes) -> list[list[Any]]:
        """Decide transactions, or answer a question about them; return the exceptions."""
        return list(self.ask(DECIDE, decision, tokens, answer=DECIDED)[0])

    def admin(self, verb: str, **arguments: object) -> Any:
        """Send an administrator's request; return its result."""
        return self.ask(ADMIN, verb, arguments, answer=ADMIN_REPLY)[0]

    def question(self) -> Question:
        """Wait for the next question about a transaction."""
        while not self._questions:
            self._next_packet()
        return self._questions.popleft()

    def questions(self) -> list[Question]:
        """Return what was asked so far and not read by `question`, without waiting for more."""
        self.ask(PING, answer=PONG)
        asked = [*self._questions]
        self._questions.clear()
        return asked

    def body(self) -> bytes:
        """Wait for the next delivery; return its body."""
        return self.receive().message.body

    def bodies(self) -> set[bytes]:
        """Return the bodies delivered so far and not received yet, without waiting for more."""
        self.ask(PING, answer=PONG)
        bodies = {delivery.message.body for delivery in self._deliveries}
        self._deliveries.clear()
        return bodies

    def exchange(self, data: bytes) -> list[Any]:
        """Send a frame as it is; return the first packet that answers its request, or ends the connection."""
        request = msgpack.unpackb(data[4:])[1]
        self.send_bytes(data)
        while True:
            packet = self._next_packet()
            if packet[1] == request or packet[:2] == [REFUSAL, 0]:
                return packet

    def wait_for(self, number: int) -> list[Any]:
        """Read up to a packet of this type and return it."""
        while (packet := self._next_packet())[0] != number:
            pass
        return packet

    def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(data)

    def _next_packet(self) -> list[Any]:
        packet = super()._next_packet()
        if packet[0] == ASK:
            attempts, tokens, messages = packet[2:5]
            each = [attempts] * len(tokens) if isinstance(attempts, int) else attempts
            self._questions.extend(Question(*one) for one in zip(each, tokens, messages, strict=True))
        return packet
