"""A program that binds messages to its own database, with traps at its steps; for the crash-point suite.

`python -m tests.faults.crashing_producer ADDRESS TIMEOUT`, in the folder that it shares with the test: databases,
history, and the trap are there. A line on its standard input is a `Round`, and "done" the answer.

Each transaction of a round has a database file of its own, so that all are inside their local transaction at
once. Its business row is what the check function looks for. Without that row it says rollback, which is
right here: the broker is told "running" by the client while a block is open, and the test starts a new program
only when the old one is dead, and its open database transactions with it.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from itertools import count
from os import getpid
from pathlib import Path
from typing import Any, Final, NamedTuple

import kiteq_client.dialler
from kiteq.errors import KiteQError, Refused
from kiteq.message import Message, Received
from kiteq.remoting.packets import DECISION_COMMIT, DECISION_ROLLBACK, Decide
from kiteq_client import Client, Decision, Outcome, Transaction
from kiteq_client.deciding import Deciding
from tests.faults.history import (
    Asked,
    DecideInvoked,
    DecideOk,
    DecideRefused,
    HalfInvoked,
    HalfOk,
    HalfRefused,
    History,
    digest_of,
)
from tests.faults.trap import PRODUCER, Trap

__all__ = ["GROUP", "HISTORY", "SHAPES", "TOPICS", "Round", "business_rows"]

GROUP: Final = "bank"
TOPICS: Final = ("orders", "events")
HISTORY: Final = "producer.jsonl"
SHAPES: Final = ("single", "several", "added", "raised", "opposite")
"""One message; three in two topics, one of them delayed; one and two that are added; left by an exception; and one
that is decided the other way."""

DELAY_SECONDS: Final = 0.1


class Round(NamedTuple):
    """What to do with the next transactions, one of each shape.

    commit: what becomes of them ("opposite" gets the other). silent: nobody decides but the checks ("opposite"
    and "raised" are decided at once). unsure: the check function first says that it does not know.
    check_after: seconds until the broker first asks.
    """

    commit: bool
    silent: bool = False
    unsure: bool = False
    check_after: float = 0.3


def _database(folder: Path, shape: str) -> sqlite3.Connection:
    connection = sqlite3.connect(folder / f"{shape}.sqlite", isolation_level=None, timeout=5)
    connection.execute("PRAGMA synchronous=OFF")  # processes die here, not the machine
    connection.execute("CREATE TABLE IF NOT EXISTS business (id TEXT PRIMARY KEY)")
    return connection


def business_rows(folder: Path) -> set[str]:
    """Return the transactions whose local transaction was committed."""
    rows: set[str] = set()
    for shape in SHAPES:
        connection = _database(folder, shape)
        rows.update(row[0] for row in connection.execute("SELECT id FROM business"))
        connection.close()
    return rows


class _Local(Exception):
    """What the business code raises."""


class _Work:
    """One transaction and its local one."""

    def __init__(self, producer: _Producer, shape: str, round_: Round) -> None:
        self.shape = shape
        self.round = round_
        self.commits = round_.commit != (shape == "opposite")
        self.is_silent = round_.silent and shape not in {"opposite", "raised"}
        kinds = {"several": [("orders", "paid"), ("events", "x"), ("orders", "sent")]}
        self.messages = [
            Message(*kind, shape, delay=DELAY_SECONDS if kind[1] == "sent" else None)
            for kind in kinds.get(shape, [("orders", "paid")])
        ]
        self.id = self.messages[0].id.hex()
        self.transaction: Transaction = producer.client.transaction(*self.messages, check_after=round_.check_after)
        self.stack = AsyncExitStack()
        self.database = producer.databases[shape]
        self.failed = False
        self._producer = producer
        self._history = producer.history

    async def run(self, step: Callable[[_Work], Coroutine[Any, Any, None]]) -> None:
        if not self.failed:
            try:
                await step(self)
            except KiteQError as error:
                await self._give_up(error)

    async def _give_up(self, error: KiteQError) -> None:
        """Leave as a block does that an error passes through."""
        sys.stderr.write(f"{self.shape}: {error}\n")
        self.failed = True
        if self.database.in_transaction:
            self.database.rollback()
        with suppress(KiteQError):
            await self.stack.__aexit__(type(error), error, None)

    async def enter(self) -> None:
        self._invoked(self.messages)
        with self._noting_refusals(self.messages):
            await self.stack.enter_async_context(self.transaction)
        self._history.write(HalfOk(time.monotonic(), self.id, [one.id.hex() for one in self.messages]))

    async def add(self) -> None:
        if self.shape == "added":
            for topic in TOPICS:
                message = Message(topic, "paid", "added")
                self._invoked([message])
                with self._noting_refusals([message]):
                    await self.transaction.add(message)
                self._history.write(HalfOk(time.monotonic(), self.id, [message.id.hex()]))

    def _invoked(self, messages: list[Message]) -> None:
        rows: list[list[object]] = [
            [one.id.hex(), one.topic, one.message_type, digest_of(one.encoded()), one.deliver_limit] for one in messages
        ]
        self._history.write(HalfInvoked(time.monotonic(), self.id, GROUP, "", rows))

    def _noting_refusals(self, messages: list[Message]) -> _NotingRefusals:
        return _NotingRefusals(self._history, self.id, [one.id.hex() for one in messages])

    async def write_row(self) -> None:
        self.database.execute("BEGIN IMMEDIATE")
        self.database.execute("INSERT INTO business VALUES (?)", [self.id])

    async def end_local(self) -> None:
        self.database.execute("COMMIT" if self.commits else "ROLLBACK")

    async def leave(self) -> None:
        if self.shape == "raised":
            error = _Local()
            with suppress(_Local):
                await self.stack.__aexit__(_Local, error, None)
                raise error
            return
        if self.is_silent:
            self.transaction.abandon()
            await self.stack.aclose()
            return
        decision = Decision.COMMIT if self.commits else Decision.ROLLBACK
        call = self._producer.invoked(self.id, decision)
        try:
            if not self.commits:
                await self.transaction.rollback()
            await self.stack.aclose()
        except Refused as error:
            self._history.write(DecideRefused(time.monotonic(), call, error.code))
            raise
        if self.transaction.outcome in {Outcome.COMMITTED, Outcome.ROLLED_BACK}:
            self._history.write(DecideOk(time.monotonic(), call))


class _NotingRefusals:
    """Notes a definite no to half messages."""

    def __init__(self, history: History, transaction: str, messages: list[str]) -> None:
        self._history = history
        self._what = (transaction, messages)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Refused) and not error.temporary:
            self._history.write(HalfRefused(time.monotonic(), *self._what, error.code))


class _Producer:
    """The program; it is the `Checker` of its client."""

    def __init__(self, folder: Path, history: History, trap: Trap) -> None:
        self.client: Client
        self.history = history
        self.databases = {shape: _database(folder, shape) for shape in SHAPES}
        self._readers = [_database(folder, shape) for shape in SHAPES]
        self._trap = trap
        self._calls = count(1)
        self._open_calls: dict[tuple[str, Decision], list[str]] = {}
        self._unsure: set[str] = set()
        self._connection = f"{GROUP}-{getpid()}"

    def invoked(self, transaction: str, decision: Decision) -> str:
        """Note a decision before it is sent; return its call."""
        call = f"{self._connection}-{next(self._calls)}"
        self._open_calls.setdefault((transaction, decision), []).append(call)
        self.history.write(DecideInvoked(time.monotonic(), call, transaction, GROUP, decision.value))
        return call

    async def check(self, message: Received) -> Decision:
        """Answer a check from the database."""
        identity = message.id.hex()
        self.history.write(Asked(time.monotonic(), self._connection, GROUP, identity))
        found = any(
            reader.execute("SELECT 1 FROM business WHERE id = ?", [identity]).fetchone() for reader in self._readers
        )
        decision = Decision.COMMIT if found else Decision.ROLLBACK
        if identity in self._unsure:
            self._unsure.discard(identity)
            decision = Decision.UNKNOWN
        self.invoked(identity, decision)
        self._trap.reach("checking", found)
        return decision

    async def decided(self, transaction_id: bytes, decision: Decision) -> None:
        """Note that the broker has a decision on disk."""
        for call in self._open_calls.pop((transaction_id.hex(), decision), ()):
            self.history.write(DecideOk(time.monotonic(), call))

    async def play(self, round_: Round) -> None:
        """Take the transactions of a round through their steps, all at the same time."""
        works = [_Work(self, shape, round_) for shape in SHAPES]
        if round_.unsure:
            self._unsure |= {work.id for work in works if work.is_silent}
        for step, point in (
            (_Work.enter, "block-entered"),
            (_Work.add, "added"),
            (_Work.write_row, "row-written"),
            (_Work.end_local, "local-over"),
            (_Work.leave, "left"),
        ):
            await asyncio.gather(*[work.run(step) for work in works])
            self._trap.reach(point)


def _trap_decisions(trap: Trap) -> None:
    """Put a trap where the client is about to send decisions."""
    take = Deciding.take

    def taking(deciding: Deciding, next_request: Callable[[], int]) -> list[Decide]:
        packets = take(deciding, next_request)
        commits = [
            packet.decision == DECISION_COMMIT
            for packet in packets
            if packet.decision in {DECISION_COMMIT, DECISION_ROLLBACK}
        ]
        if commits:
            trap.reach("decision-made", *commits)
        return packets

    setattr(Deciding, "take", taking)  # noqa: B010 mypy takes no other


async def _main(address: str, timeout: float) -> None:
    folder = Path.cwd()
    trap = Trap(folder, PRODUCER)
    _trap_decisions(trap)
    kiteq_client.dialler.RECONNECT_SECONDS_MAX = 0.1  # type: ignore[misc]
    with History(folder / HISTORY, mortal=True) as history:
        producer = _Producer(folder, history, trap)
        client = Client(
            f"kiteq://{address}", group=GROUP, topics=TOPICS, on_check=producer, timeout=timeout, wait=False
        )
        producer.client = client
        async with client:
            while line := await asyncio.to_thread(sys.stdin.readline):
                await producer.play(Round(*json.loads(line)))
                sys.stdout.write("done\n")
                sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], float(sys.argv[2])))
