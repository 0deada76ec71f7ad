"""Producers of transactions of every kind, which go on through crashes of the broker until told to drain.

Of ten transactions four are committed and three rolled back by their producer; three are left to the checks.
The members of a group share a `Ledger`, as programs share a database: whoever is asked looks there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Final

import trio

from kiteq.message import Message
from tests.faults.driver import DriverConnection, Lost, open_connection
from tests.faults.half_driver import COMMIT, ROLLBACK, RUNNING, UNKNOWN, Question
from tests.faults.history import LocalOutcome
from tests.faults.load import RECONNECT_SECONDS, Load

__all__ = ["TOPICS", "Ledger", "transact"]

TOPICS: Final = ("orders", "events")
UNANSWERED_MAX: Final = 6
HEDGES_MAX: Final = 3
"""So often a check may bring no decision: the waits between checks double."""
HEDGE: Final = 0.25
"""Chance of that."""
CONTESTED: Final = 0.03
CONTESTED_MAX: Final = 2
"""Of the contested transactions, so many of the latest are decided again and again."""
FORGET: Final = 0.01
"""Chance of no answer at all, each of which costs a long wait."""


@dataclass
class Ledger:
    """What a group's database knows. fates: COMMIT or ROLLBACK, by transaction; told: whether its producer decides.

    begun: transactions that are known to be durable: only those have a local transaction. confirmed: decisions
    that the broker confirmed. contested: transactions that several members decide at once, each as it likes.
    """

    group: str
    fates: dict[str, int] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)
    confirmed: dict[str, int] = field(default_factory=dict)
    contested: list[str] = field(default_factory=list)

    def answer(self, transaction: str) -> int:
        """Return what became of a transaction; one that was not begun never will be."""
        if transaction not in self.begun:
            self.fates[transaction] = ROLLBACK
        return self.fates[transaction]

    def outcomes(self) -> list[LocalOutcome]:
        """Return how the local transactions ended, for the history."""
        now = time.monotonic()
        return [LocalOutcome(now, one, self.fates[one] == COMMIT) for one in sorted(self.begun)]


async def transact(load: Load, ledger: Ledger, seed: str, topics: Sequence[str] = TOPICS) -> None:
    """Prepare, decide and answer checks until the run stops."""
    random = Random(seed)
    lost: list[Sequence[Message]] = []
    while not load.stop:
        with suppress(Lost):
            connection = await open_connection(load.port, ledger.group, load.history, topics=topics)
            # A client sends again what had no answer; a program that was started again does not.
            again = lost if random.random() < 0.5 else []
            lost = connection.transacting.lost
            await _Worker(load, ledger, connection, random).run(again)
        await trio.sleep(RECONNECT_SECONDS)


class _Worker:
    """One connection of a producer."""

    def __init__(self, load: Load, ledger: Ledger, connection: DriverConnection, random: Random) -> None:
        self._load = load
        self._ledger = ledger
        self._connection = connection
        self._half = connection.transacting
        self._random = random
        self._deciding: dict[str, int] = {}

    async def run(self, prepare_again: list[Sequence[Message]]) -> None:
        """Go on until the connection is lost, or the run stops."""
        if prepare_again:
            await self._half.prepare(*prepare_again, check_after=0.3)
        again = [one for one in self._ledger.told & self._ledger.begun if one not in self._ledger.confirmed]
        await self._decide(self._random.sample(sorted(again), len(again) // 2))  # the others are left to the checks
        load, ledger, random = self._load, self._ledger, self._random
        while not load.stop and not self._connection.left:
            if not load.drain and load.sent < load.messages_max and self._half.unanswered < UNANSWERED_MAX:
                await self._begin()
            with trio.move_on_after(0.005 + 0.02 * random.random()):
                await self._connection.receive()
            await self._look_at_answers()
            await self._answer_checks()
            for one in ledger.contested[-CONTESTED_MAX:]:
                if random.random() < 0.1:
                    await self._half.decide(random.choice((COMMIT, ROLLBACK)), one)
        await self._connection.answered()
        await self._connection.goodbye()

    def _message(self) -> Message:
        random = self._random
        body = random.randbytes(random.choice((0, 20, 200)))
        return Message(random.choice(TOPICS), random.choice(("x.a", "x.b", "y")), body)

    async def _begin(self) -> None:
        random = self._random
        transactions = [
            [self._message() for _ in range(random.choice((1, 1, 2, 4)))] for _ in range(random.randint(1, 8))
        ]
        for messages in transactions:
            identity = messages[0].id.hex()
            how = random.random()
            commits = how < 0.4 or (how >= 0.7 and random.random() < 0.5)
            self._ledger.fates[identity] = COMMIT if commits else ROLLBACK
            if how < 0.7:
                self._ledger.told.add(identity)
        self._load.sent += sum(map(len, transactions))
        await self._half.prepare(*transactions, check_after=random.choice((0.1, 0.3, 1.0)))

    async def _look_at_answers(self) -> None:
        ledger, half, random = self._ledger, self._half, self._random
        prepared = [one for one in half.prepared if one not in ledger.begun and one not in ledger.contested]
        half.prepared.clear()
        for one in prepared:
            if random.random() < CONTESTED:
                ledger.told.discard(one)
                ledger.contested.append(one)
            else:
                ledger.begun.add(one)
        for one in prepared:
            if random.random() < 0.1 and self._load.sent < self._load.messages_max:
                await half.enlist(one, self._message(), self._message())
                await self._connection.answered()
        await self._decide([one for one in prepared if one in ledger.told])
        for identity, code in half.codes.items():
            if code == "ok" and identity in self._deciding:
                ledger.confirmed[identity] = self._deciding[identity]
                if random.random() < 0.03:
                    await half.decide(COMMIT if ledger.confirmed[identity] == ROLLBACK else ROLLBACK, identity)
        for identity in half.codes:
            self._deciding.pop(identity, None)
        half.codes.clear()

    async def _decide(self, transactions: Sequence[str]) -> None:
        for decision in (COMMIT, ROLLBACK):
            chosen = [one for one in transactions if self._ledger.fates[one] == decision]
            self._deciding.update(dict.fromkeys(chosen, decision))
            if chosen:
                await self._half.decide(decision, *chosen)

    async def _answer_checks(self) -> None:
        questions, self._half.questions = self._half.questions, []
        for question in questions:
            answer = self._answer(question)
            if answer is not None:
                self._deciding.update({question.id: answer} if answer in {COMMIT, ROLLBACK} else {})
                await self._half.decide(answer, question.id)

    def _answer(self, question: Question) -> int | None:
        random = self._random
        if not self._load.drain and random.random() < FORGET:
            return None
        if question.attempt <= HEDGES_MAX and random.random() < HEDGE:
            return random.choice((UNKNOWN, RUNNING))
        return self._ledger.answer(question.id)
