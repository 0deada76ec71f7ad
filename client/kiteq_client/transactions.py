"""The transactions of a client: where each is, and who waits for what about it.

Theory of operation. A `Half` stands for one transaction while the client knows something about it that its
check function does not: its block is open, or beginning it failed and nothing may come of it. Calls wait
for an event that the answer sets, or the client's watchdog; there is no timer per call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final

import anyio

from kiteq.errors import (
    Refused,
    RemoteProtocolError,
    TransactionConflict,
    UnknownTransaction,
)
from kiteq.message import Message
from kiteq.remoting.packets import Ask
from kiteq_client.checking import Check, Checking
from kiteq_client.deciding import Verdict
from kiteq_client.decision import Decision
from kiteq_client.half import Half, split
from kiteq_client.outgoing import Outgoing
from kiteq_client.placing import Placing
from kiteq_client.preparing import BEGIN, Preparation
from kiteq_client.statistics import Counters

if TYPE_CHECKING:
    from kiteq_client.broker import Broker
    from kiteq_client.brokers import Brokers

__all__ = ["Transactions"]

logger = logging.getLogger("kiteq_client")

ABANDONED_MAX: Final = 10_000
"""Transactions remembered that failed to begin; about older ones the check function is asked."""
TOPICS_WARNED_MAX: Final = 1_000


class Transactions:
    """Brings messages and decisions to the brokers, and answers what these ask.

    brokers: of the client. topics: that it named. check: raises when the client cannot be used.
    """

    def __init__(
        self,
        brokers: Brokers,
        checking: Checking,
        outgoing: Outgoing,
        counters: Counters,
        *,
        timeout: float,
        handler_timeout: float,
        topics: Sequence[str],
        watched: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        self.checking = checking
        self.timeout = timeout
        self.check = check
        self.brokers = brokers
        self.placing = Placing(brokers, outgoing, watched)
        self.counters = counters
        self._handler_timeout = handler_timeout
        self._topics = set(topics)
        self._warned: set[str] = set()
        self._watched = watched
        self._halves: dict[bytes, Half] = {}
        self._abandoned: dict[bytes, Half] = {}
        self._deciding: dict[Verdict, None] = {}
        self._asking: dict[anyio.Event, float] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether anybody waits, a decision is not answered, or the checker is not told of one."""
        return bool(
            self.placing.is_waiting or self._deciding or self._asking or self.pending or self.checking.is_telling
        )

    @property
    def pending(self) -> int:
        """How many decisions are not answered."""
        return sum(len(broker.deciding.pending) for broker in self.brokers.all)

    # --- preparing -----------------------------------------------------------------------------
    async def begin(self, messages: Sequence[Message], check_after_ms: int) -> Half:
        """Make a transaction of messages durable at one broker; the client answers that it runs until `let_go`.

        Raises what `send` raises; then nothing has happened, and nothing will.
        """
        self.check()
        key = messages[0].id
        if (known := self._halves.get(key)) is not None:
            if known.abandoned:
                raise TransactionConflict(
                    "transaction_conflict",
                    f"message {key.hex()} was in a transaction that failed to begin, and that is rolled back; "
                    "make a new Message",
                )
            raise ValueError(f"message {key.hex()} is in an open transaction already")
        self._warn_of_topics(messages)
        topics = frozenset(message.topic for message in messages)
        self.brokers.name_topics(topics)
        parts = split(messages)
        largest = max(len(message.body) for message in messages)
        half = Half(key, parts[0][0])
        first = Preparation(
            key, BEGIN, parts[0], largest,
            check_after_ms=check_after_ms, deadline=monotonic() + self.timeout, topics=topics,
        )  # fmt: skip
        self._halves[key] = half
        try:
            self.placing.place(first)
            await self.placing.wait(first)
            half.broker = first.broker
            half.name = half.place.name
            half.token = key + first.handle.to_bytes(8, "big")
            for blobs in parts[1:]:
                await self._enlist(half, blobs, largest)
        except BaseException:
            self._halves.pop(key, None)
            if first.may_be_stored:
                self._abandon(half, first)
            raise
        return half

    async def enlist(self, half: Half, message: Message) -> None:
        """Add a message to an open transaction. Raises what `send` raises; adding it again is safe."""
        self.check()
        if not half.place.serves_topic(message.topic):
            raise Refused(
                "topic_not_served",
                f"topic {message.topic!r} is not served by broker {half.name}, which has the transaction",
            )
        self._warn_of_topics((message,))
        await self._enlist(half, [message.encoded()], len(message.body))

    async def _enlist(self, half: Half, blobs: list[bytes], body_bytes: int) -> None:
        addition = Preparation(half.id, half.token, blobs, body_bytes, deadline=monotonic() + self.timeout)
        self.placing.give(addition, half.place)
        await self.placing.wait(addition)

    def _abandon(self, half: Half, first: Preparation) -> None:
        """Nothing may come of a transaction that its caller could not begin, so roll it back."""
        half.abandoned = True
        half.broker = first.broker
        if first.handle:
            half.token = half.id + first.handle.to_bytes(8, "big")
        self._halves[half.id] = self._abandoned[half.id] = half
        if len(self._abandoned) > ABANDONED_MAX:
            oldest = self._abandoned.pop(next(iter(self._abandoned)))
            del self._halves[oldest.id]
            oldest.place.deciding.drop(oldest.id)
        self._roll_back(half)

    def _roll_back(self, half: Half) -> None:
        half.place.deciding.submit(Verdict(half.token, Decision.ROLLBACK, half.name, quiet=True))
        self._watched()

    def answered_late(self, preparation: Preparation) -> None:
        """Roll back what turns out to be durable although its caller was told that it failed."""
        if not preparation.token and (half := self._abandoned.get(preparation.id)) is not None:
            half.token = half.id + preparation.handle.to_bytes(8, "big")
            self._roll_back(half)

    def _warn_of_topics(self, messages: Sequence[Message]) -> None:
        for message in messages:
            topic = message.topic
            if topic not in self._topics and topic not in self._warned and len(self._warned) < TOPICS_WARNED_MAX:
                self._warned.add(topic)
                logger.warning(
                    "a transaction publishes to topic %s, which is not in topics=: after a crash the broker asks "
                    "only clients that name it there",
                    topic,
                )

    # --- deciding ------------------------------------------------------------------------------
    async def decide(self, broker: Broker, verdict: Verdict) -> None:
        """Send a decision until it is answered, and wait for the answer until `timeout`."""
        done = anyio.Event()
        verdict.finish = done.set
        verdict.deadline = verdict.deadline or monotonic() + self.timeout
        self._deciding[verdict] = None
        self._watched()
        self.brokers.remembered(broker).deciding.submit(verdict)
        try:
            await done.wait()
        finally:
            verdict.finish = None
            del self._deciding[verdict]

    def has_at(self, broker: Broker) -> bool:
        """Whether a block is open whose transaction is at this broker."""
        return any(half.broker is broker and not half.abandoned for half in self._halves.values())

    def let_go(self, half: Half) -> None:
        """Leave a transaction to the checks."""
        if self._halves.get(half.id) is half and not half.abandoned:
            del self._halves[half.id]

    def settled(self, verdict: Verdict) -> None:
        """Count a decision that the broker has answered for good, and tell the checker."""
        counters, error = self.counters, verdict.error
        if error is None:
            if verdict.decision is Decision.COMMIT:
                counters.committed += 1
            else:
                counters.rolled_back += 1
            self.checking.decided(verdict.id, verdict.decision)
        elif verdict.quiet and isinstance(error, UnknownTransaction):
            return  # the broker may yet get it, from a connection that was lost, and ask
        else:
            counters.conflicts += isinstance(error, TransactionConflict)
            counters.unknown_transactions += isinstance(error, UnknownTransaction)
            if verdict.finish is None:
                logger.error("%s of transaction %s was refused: %s", verdict.decision.value, verdict.id.hex(), error)
        self._halves.pop(verdict.id, None)
        self._abandoned.pop(verdict.id, None)

    # --- checks --------------------------------------------------------------------------------
    def asked(self, broker: Broker, packet: Ask) -> None:
        """Answer a broker's questions, those about what was decided or is running without asking anybody."""
        count = len(packet.tokens)
        attempts = [packet.attempts] * count if type(packet.attempts) is int else packet.attempts
        if len(packet.messages) != count or len(attempts) != count:  # type: ignore[arg-type]
            raise RemoteProtocolError("Ask does not have one message and one attempt per transaction")
        for token, blob, attempt in zip(packet.tokens, packet.messages, attempts, strict=True):  # type: ignore[arg-type]
            key = token[:16]
            half = self._halves.get(key)
            pending = next((one for one in self.brokers.all if key in one.deciding.pending), None)
            if pending is not None:
                self._decide_again(broker, token, pending)
            elif half is None:
                answer = partial(self._answer, broker, broker.name, token)
                self.checking.ask(Check(key, blob, attempt, self._handler_timeout, answer))
            elif half.abandoned:
                half.broker, half.name, half.token = broker, broker.name, token
                self.counters.checks[Decision.ROLLBACK.value] += 1
                self._roll_back(half)
            else:
                self._answer(broker, broker.name, token, Decision.RUNNING)

    def _decide_again(self, broker: Broker, token: bytes, pending: Broker) -> None:
        """Send what was decided to the broker that asks; it may have moved to another address."""
        deciding = broker.deciding
        verdict = pending.deciding.pending[token[:16]]
        self.counters.checks[verdict.decision.value] += 1
        if pending is not broker or verdict.broker not in ("", deciding.broker):
            del pending.deciding.pending[verdict.id]
            verdict.broker, verdict.queued = deciding.broker, False
            deciding.pending[verdict.id] = verdict
        deciding.again(verdict, token)

    def _answer(self, broker: Broker, name: str, token: bytes, decision: Decision) -> None:
        self.counters.checks[decision.value] += 1
        if decision in (Decision.COMMIT, Decision.ROLLBACK):
            self.brokers.remembered(broker).deciding.submit(Verdict(token, decision, name))
            self._watched()
        elif broker.deciding.broker == name:
            broker.deciding.note(decision, token)

    async def ask_now(self, half: Half) -> Decision:
        """Ask the check function about a transaction whose block was left by an exception.

        Returns UNKNOWN if there is no answer within `timeout`; one that comes later is sent all the same.
        """
        done = anyio.Event()
        answers: list[Decision] = []

        def answered(decision: Decision) -> None:
            if done in self._asking:
                answers.append(decision)
                done.set()
            elif decision in (Decision.COMMIT, Decision.ROLLBACK):
                self.brokers.remembered(half.place).deciding.submit(Verdict(half.token, decision, half.name))

        self._asking[done] = monotonic() + self.timeout
        self._watched()
        try:
            if self.checking.ask(Check(half.id, half.blob, 1, self.timeout, answered), first=True):
                await done.wait()
        finally:
            del self._asking[done]
        return answers[0] if answers else Decision.UNKNOWN

    # --- the lifetime --------------------------------------------------------------------------
    def watch(self, now: float, not_connected: Callable[[Iterable[str]], Exception | None]) -> None:
        """End calls whose time is over; move on what waits for a broker that is gone."""
        self.placing.watch(now, f"no answer within {self.timeout:g} s", not_connected)
        for verdict in [one for one in self._deciding if one.deadline <= now]:
            if verdict.finish is not None:
                verdict.finish()
        for done in [one for one, deadline in self._asking.items() if deadline <= now]:
            done.set()
        for broker in self.brokers.all:
            broker.deciding.retry(now)

    def end_all(self, error: Exception | None = None) -> None:
        """End every call: the client has failed with `error`, or was left."""
        self.placing.end_all(error)
        for verdict in list(self._deciding):
            if verdict.finish is not None:
                verdict.finish()
        for done in self._asking:
            done.set()
        self.checking.stopping = True
        if not error and self.pending:
            logger.warning(
                "%d decisions were not answered when the client was left; the broker will ask for them", self.pending
            )
