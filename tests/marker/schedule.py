"""Producers and checks, step by step in an order that a seed decides; and what must hold at the end.

Theory of operation. Each actor is a greenlet; it pauses before each statement, its own or the marker's, and
the scheduler picks who goes on. All run in one thread, so nobody may wait for a lock: waits fail at once.
The broker is a dictionary: the first decision wins, another one is a conflict. In the end it asks until
every message is decided. Then the message is committed exactly if its business row is there.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from enum import StrEnum
from typing import Any, Final

import greenlet

from kiteq_client.decision import Decision
from kiteq_client.marker import AlreadyRolledBack, Marker
from tests.marker.databases import Database, execute, pausing

__all__ = ["Broker", "FakeTransaction", "Kind", "Scenarios", "Violation"]

SETTLE_SECONDS_MAX: Final = 20.0
"""For the server to notice that a connection is gone."""
BATCH: Final = 250


class Violation(AssertionError):
    """A message and its business row do not agree."""


class Kind(StrEnum):
    """What a scenario is about; checks happen in all of them."""

    COMMIT = "commit"
    ROLLBACK = "rollback"
    CRASH = "crash"
    CHECK = "check"
    LATE_COMMIT = "late commit"


class Broker:
    """What the broker knows: the first decision of each message."""

    def __init__(self) -> None:
        self.decisions: dict[bytes, Decision] = {}
        self.conflicts: list[bytes] = []
        self.answers: Counter[Decision] = Counter()

    def decide(self, id: bytes, decision: Decision) -> None:
        self.answers[decision] += 1
        if decision in (Decision.COMMIT, Decision.ROLLBACK) and self.decisions.setdefault(id, decision) != decision:
            self.conflicts.append(id)


class FakeTransaction:
    """The transaction of the blocking client, with a broker that answers at once."""

    def __init__(self, broker: Broker, id: bytes) -> None:
        self.id = id
        self.outcome = "open"
        self.deferred = False
        self._broker = broker
        self._hooks: list[Callable[[], Any]] = []

    def on_leave(self, hook: Callable[[], Any]) -> None:
        self._hooks.append(hook)

    def defer(self) -> None:
        self.deferred = True

    def abandon(self) -> None:
        if self.outcome == "open":
            self.outcome = "unknown"

    def commit(self) -> None:
        self._broker.decide(self.id, Decision.COMMIT)
        self.outcome = "committed"

    def rollback(self) -> None:
        self._broker.decide(self.id, Decision.ROLLBACK)
        self.outcome = "rolled back"

    def leave(self) -> None:
        """Leave the block without an exception."""
        try:
            for hook in self._hooks:
                hook()
        except BaseException:
            self.abandon()
            raise
        if self.outcome == "open" and not self.deferred:
            self.commit()


class _Crashed(Exception):
    """The program of the producer ended."""


class Scenarios:
    """Runs scenarios on one database, and compares after each batch.

    swallows: the user's code catches `AlreadyRolledBack` and goes on.
    """

    def __init__(self, database: Database, marker: Marker, seed: int, *, swallows: bool = False) -> None:
        self.seed = seed
        self.done: Counter[Kind] = Counter()
        self.broker = Broker()
        self._database = database
        self._marker = marker
        self._swallows = swallows
        self._random = random.Random(seed)
        self._ids: list[tuple[bytes, Kind]] = []
        self._connection: Any = None
        self._killed: list[Any] = []
        self._answered = 0

    def run(self, kinds: Iterable[Kind]) -> None:
        """Run one scenario of each kind. Raises `Violation`, which names the seed."""
        pausing.hook = _pause
        try:
            for kind in kinds:
                self._one(kind)
                self.done[kind] += 1
                if len(self._ids) == BATCH:
                    self.compare()
            self.compare()
        finally:
            pausing.hook = None
            for connection in (*self._killed, *([self._connection] if self._connection is not None else [])):
                with suppress(Exception):
                    connection.close()
            self._killed.clear()
            self._connection = None

    def compare(self) -> None:
        """Let every message be decided, then compare with the business rows."""
        for message, _ in self._ids:
            self._settle(message)
        if self._connection is not None:
            self._connection.rollback()
        reader = self._database.connect()
        rows = {str(row[0]) for row in execute(reader, "SELECT id FROM business")}
        reader.close()
        decisions = self.broker.decisions
        wrong = [
            f"{kind}: {decisions[message].value}, business row {'present' if message.hex() in rows else 'absent'}"
            for message, kind in self._ids
            if (decisions[message] is Decision.COMMIT) != (message.hex() in rows)
        ]
        if wrong or self.broker.conflicts:
            raise Violation(f"seed {self.seed}: {len(self.broker.conflicts)} conflicts; {wrong[:5]}")
        self._ids.clear()

    # --- one scenario --------------------------------------------------------------------------
    def _one(self, kind: Kind) -> None:
        chance = self._random
        message = chance.randbytes(16)
        self._ids.append((message, kind))
        self._answered = 0
        checks = chance.randint(1, 3) if kind in (Kind.CHECK, Kind.LATE_COMMIT) else chance.randint(0, 1)
        actors = [greenlet.greenlet(lambda: self._produce(message, kind))]
        actors += [greenlet.greenlet(lambda: self._check(message)) for _ in range(checks)]
        while actors:
            actor = chance.choice(actors)
            actor.switch()
            if actor.dead:
                actors.remove(actor)

    def _check(self, id: bytes) -> None:
        _pause()
        self.broker.decide(id, self._marker.check_id(id))
        self._answered += 1

    def _produce(self, id: bytes, kind: Kind) -> None:
        tx = FakeTransaction(self.broker, id)
        if self._connection is None:
            self._connection = self._database.connect(waits=False)
        connection = self._connection
        try:
            self._work(connection, tx, kind)
        except _Crashed:
            self._connection = None
        except Exception:  # noqa: BLE001 as any user's code
            # The exception leaves both blocks: the database rolls back, the broker will ask.
            _pause()
            self._end(connection)
        else:
            if self._random.random() < 0.2:
                return  # something else raises after the commit
            _pause()
            try:
                tx.leave()
            except Exception:  # noqa: BLE001 as any user's code
                self._end(connection)

    def _work(self, connection: Any, tx: FakeTransaction, kind: Kind) -> None:
        chance = self._random
        steps: list[Callable[[], None]] = [lambda: self._mark(connection, tx)]
        insert = f"INSERT INTO business (id) VALUES ('{tx.id.hex()}')"
        steps.insert(chance.randint(0, 1) if not self._swallows else 0, lambda: _run(connection, insert))
        crash_at = chance.randint(0, 2) if kind is Kind.CRASH else None
        late_at = chance.randint(0, 2) if kind is Kind.LATE_COMMIT else None
        for number in range(3):
            if number == late_at:
                while not self._answered:
                    _pause()
            if number == crash_at:
                self._crash(connection)
            if number < len(steps):
                steps[number]()
        _pause()
        if kind is Kind.ROLLBACK:
            connection.rollback()
        else:
            connection.commit()

    def _mark(self, connection: Any, tx: FakeTransaction) -> None:
        try:
            self._marker.mark(connection, tx)
        except AlreadyRolledBack:
            if not self._swallows:
                raise

    def _crash(self, connection: Any) -> None:
        if self._random.random() < 0.5:
            self._database.kill(connection)
            self._killed.append(connection)
        else:
            connection.close()
        raise _Crashed

    def _end(self, connection: Any) -> None:
        try:
            connection.rollback()
        except Exception:  # noqa: BLE001 it was killed
            connection.close()
            self._connection = None

    def _settle(self, id: bytes) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while id not in self.broker.decisions:
            self.broker.decide(id, self._marker.check_id(id))
            if time.monotonic() > deadline:
                raise Violation(f"seed {self.seed}: {id.hex()} is not decided")


def _run(connection: Any, sql: str) -> None:
    execute(connection, sql)


def _pause() -> None:
    """Let the scheduler pick who goes on."""
    parent = greenlet.getcurrent().parent
    if parent is not None:
        parent.switch()
