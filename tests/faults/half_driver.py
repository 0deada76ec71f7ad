"""The transactions of one wire-level connection: half messages, decisions, checks, each noted in a history."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from kiteq.message import Message
from kiteq.remoting.packets import (
    DECISION_COMMIT,
    DECISION_ROLLBACK,
    DECISION_RUNNING,
    DECISION_UNKNOWN,
    Ask,
    Decide,
    Decided,
    Enlist,
    Packet,
    Prepare,
    Prepared,
    Refusal,
)
from tests.faults.history import (
    Asked,
    DecideInvoked,
    DecideOk,
    DecideRefused,
    HalfInvoked,
    HalfOk,
    HalfRefused,
    digest_of,
)

if TYPE_CHECKING:
    from tests.faults.driver import DriverConnection

__all__ = ["COMMIT", "ROLLBACK", "RUNNING", "UNKNOWN", "Question", "Transacting"]

COMMIT: Final = DECISION_COMMIT
ROLLBACK: Final = DECISION_ROLLBACK
UNKNOWN: Final = DECISION_UNKNOWN
RUNNING: Final = DECISION_RUNNING
NAMES: Final = {COMMIT: "commit", ROLLBACK: "rollback", UNKNOWN: "unknown", RUNNING: "running"}

_calls = count(1)


class Question(NamedTuple):
    """A check that was not answered yet."""

    id: str
    token: bytes
    attempt: int


class Transacting:
    """What a connection prepares, decides and is asked.

    prepared: transactions whose messages are all durable, with the broker's handle. codes: by transaction, what
    the last decision about it brought, "ok" or the code of a refusal. questions: what was asked. lost: transactions
    whose preparing had no answer when the connection ended.
    """

    def __init__(self, connection: DriverConnection) -> None:
        self._connection = connection
        self._preparing: dict[int, list[tuple[str, list[str]]]] = {}
        self._deciding: dict[int, list[tuple[str, str]]] = {}
        self._frames: dict[int, tuple[Sequence[Message], ...]] = {}
        self.lost: list[Sequence[Message]] = []
        self.prepared: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.codes: dict[str, str] = {}
        self.questions: list[Question] = []

    @property
    def unanswered(self) -> int:
        """Packets without an answer."""
        return len(self._preparing) + len(self._deciding)

    # --- what a client does -------------------------------------------------------------------

    async def prepare(self, *transactions: Sequence[Message], check_after: float = 0.0) -> None:
        """Prepare transactions in one frame."""
        parts = [(messages[0].id.hex(), messages) for messages in transactions]
        request = self._begin(parts)
        sizes = [len(messages) for _, messages in parts]
        blobs = [message.encoded() for _, messages in parts for message in messages]
        self._frames[request] = transactions
        await self._connection.transmit(Prepare(request, blobs, sizes, round(check_after * 1000)))

    async def enlist(self, transaction: str, *messages: Message) -> None:
        """Add messages to an open transaction."""
        request = self._begin([(transaction, messages)])
        blobs = [message.encoded() for message in messages]
        await self._connection.transmit(Enlist(request, bytes.fromhex(transaction), blobs))

    def _begin(self, parts: Sequence[tuple[str, Sequence[Message]]]) -> int:
        now, connection = time.monotonic(), self._connection
        for transaction, messages in parts:
            rows: list[list[object]] = [
                [one.id.hex(), one.topic, one.message_type, digest_of(one.encoded()), one.deliver_limit]
                for one in messages
            ]
            connection.note(HalfInvoked(now, transaction, connection.group, connection.name, rows))
        request = connection.next_request()
        self._preparing[request] = [
            (transaction, [one.id.hex() for one in messages]) for transaction, messages in parts
        ]
        return request

    async def decide(self, decision: int, *transactions: str) -> None:
        """Decide transactions, or answer checks, in one frame."""
        now, connection = time.monotonic(), self._connection
        calls = [(str(next(_calls)), transaction) for transaction in transactions]
        for call, transaction in calls:
            connection.note(DecideInvoked(now, call, transaction, connection.group, NAMES[decision]))
        request = connection.next_request()
        self._deciding[request] = calls
        await connection.transmit(Decide(request, decision, [bytes.fromhex(one) for one in transactions]))

    # --- what the broker says -----------------------------------------------------------------

    def take(self, packet: Packet, now: float) -> bool:
        """Take a packet if it is about transactions; return whether it was."""
        match packet:
            case Prepared():
                self._take_prepared(packet, now)
            case Decided():
                exceptions = {item[0]: str(item[1]) for item in packet.exceptions}
                for index, (call, transaction) in enumerate(self._deciding.pop(packet.request)):
                    code = exceptions.get(index)
                    self.codes[transaction] = code or "ok"
                    self._connection.note(DecideRefused(now, call, code) if code else DecideOk(now, call))
            case Ask():
                attempts = packet.attempts
                for index, token in enumerate(packet.tokens):
                    attempt = attempts if isinstance(attempts, int) else attempts[index]
                    self.questions.append(Question(token[:16].hex(), token, attempt))
                    asked = Asked(now, self._connection.name, self._connection.group, token[:16].hex())
                    self._connection.note(asked)
            case Refusal() if packet.request in self._preparing:
                self._frames.pop(packet.request, None)
                for transaction, messages in self._preparing.pop(packet.request):
                    self._refused(now, transaction, messages, packet.code)
            case Refusal() if packet.request in self._deciding:
                for call, transaction in self._deciding.pop(packet.request):
                    self.codes[transaction] = packet.code
                    self._connection.note(DecideRefused(now, call, packet.code))
            case _:
                return False
        return True

    def _take_prepared(self, packet: Prepared, now: float) -> None:
        exceptions = {item[0]: str(item[1]) for item in packet.exceptions}
        self._frames.pop(packet.request, None)
        for index, (transaction, messages) in enumerate(self._preparing.pop(packet.request)):
            if (code := exceptions.get(index)) is not None:
                self._refused(now, transaction, messages, code)
                continue
            handles = packet.handles
            self.prepared[transaction] = handles + index if isinstance(handles, int) else handles[index]
            self._connection.note(HalfOk(now, transaction, messages))

    def _refused(self, now: float, transaction: str, messages: list[str], code: str) -> None:
        self.refused[transaction] = code
        self._connection.note(HalfRefused(now, transaction, messages, code))

    def forget(self) -> None:
        """Note that nothing will be answered any more."""
        self.lost += [messages for frame in self._frames.values() for messages in frame]
        self._frames.clear()
        self._preparing.clear()
        self._deciding.clear()
