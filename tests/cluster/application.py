"""Programs that use `kiteq_client` on a cluster, and auditors; all tasks of one process, which tells what it sees.

`python -m tests.cluster.application '<json of Plan>'`. A line on its standard input is a command, each answered by
a line of JSON on its standard output:

    (start)   the groups are bound at every broker
    produce   producers begin, transactions too
    drain     producers have ended, and nothing is left at any broker
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Final

import trio

from kiteq.binding.bindings import Binding, direct, fanout
from kiteq.errors import KiteQError, Refused
from kiteq.message import BadMessage, Message, Received, decode
from kiteq_client import Client, Decision, Outcome, Transaction
from tests.faults.driver import open_connection
from tests.faults.history import (
    Asked,
    Bound,
    DecideInvoked,
    DecideOk,
    DecideRefused,
    Delivered,
    Drained,
    HalfInvoked,
    HalfOk,
    HalfRefused,
    History,
    LocalOutcome,
    Opened,
    Run,
    Settling,
)
from tests.faults.load import Load, Temper, consume, count_left, final_state
from tests.faults.sending import digest, send_noted
from tests.faults.several import AUDIT

__all__ = ["BROKER_HISTORY", "HISTORY", "TOPICS", "Plan"]

HISTORY: Final = "application.jsonl"
BROKER_HISTORY: Final = "audit-{}.jsonl"
TOPICS: Final = ("orders", "events")
EVERYTHING: Final = [fanout(topic) for topic in TOPICS]
MEMBERS: Final[list[tuple[str, list[Binding]]]] = [
    ("books", EVERYTHING),
    ("books", EVERYTHING),
    ("mail", [direct("orders", "paid")]),
]
ABSENT: Final = ("ledger", [direct("orders", "paid")])
"""A group that binds at the start, and of which nobody is there until the end: brokers know it from the registry."""
PRODUCERS: Final = ("shop", "shop", "billing")
BANK: Final = "bank"
BANKERS: Final = 3
"""Tasks of one client, each with one transaction at a time."""
PAUSE_SECONDS_MAX: Final = 0.06
CONSUMER_TIMEOUT_SECONDS: Final = 2.0
ENTER_SECONDS_MAX: Final = 60.0
DRAIN_SECONDS_MAX: Final = 60.0
FAILING: Final = 0.02
CHECK_AFTER_SECONDS: Final = 0.5
SILENCE_SECONDS_MAX: Final = 12.0
"""Of a broker, before its auditor connects again: longer than most faults, which this is to live through."""
AUDITOR: Final = Temper(hold=0.02)
"""It never drops a connection, so the order in which messages come to it tells the broker's."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    brokers: HOST:PORT of each, for the auditors. there: those that run at the start. timeout: of producers, in seconds.
    """

    registry: str
    brokers: list[str]
    there: list[str]
    folder: str
    timeout: float
    ack_deadline: float
    seed: int


def digest_of_blob(blob: bytes) -> str:
    """Return the same for the bytes that an auditor gets."""
    try:
        return digest(decode(blob, AUDIT, 1))
    except BadMessage:
        return "damaged"


@dataclass
class Ledger:
    """What the bank's database says of a transaction: True: its local transaction was committed."""

    fates: dict[str, bool] = field(default_factory=dict)

    def answer(self, transaction: str) -> bool:
        """Return what became of it; of one that was not begun nothing ever will."""
        return self.fates.setdefault(transaction, False)


class Application:
    """The tasks of one run."""

    def __init__(self, plan: Plan, history: History, audits: list[History]) -> None:
        self._plan = plan
        self._history = history
        self._loads = [
            Load(int(port), audit, 0, host=host, digest=digest_of_blob, silence_max=SILENCE_SECONDS_MAX)
            for (host, _, port), audit in zip([one.rpartition(":") for one in plan.brokers], audits, strict=True)
        ]
        self._random = Random(plan.seed)
        self._calls = (f"call-{number}" for number in count(1))
        self._ledger = Ledger()
        self._done = False
        self._drained = trio.Event()
        self._errors: list[str] = []

    async def run(self) -> None:
        """Do what standard input says, until it ends."""
        self._note(Run(time.monotonic(), self._plan.ack_deadline, resends=True))
        commands = trio.wrap_file(sys.stdin)
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            for number, load in enumerate(self._loads):
                nursery.start_soon(consume, load, AUDIT, EVERYTHING, AUDITOR, f"{self._plan.seed}-{number}")
            for number, (group, bindings) in enumerate(MEMBERS):
                await nursery.start(self._consume, f"{group}-{number}", group, bindings)
            await self._bind(*ABSENT)
            self._answer()
            async for line in commands:
                if line.strip() == "produce":
                    producing = await stack.enter_async_context(trio.open_nursery())
                    for group in PRODUCERS:
                        producing.start_soon(self._produce, group)
                    producing.start_soon(self._bank)
                    self._answer()
                elif line.strip() == "drain":
                    self._done = True
                    await nursery.start(self._consume, "ledger-0", *ABSENT)
                    await self._drain()
                    self._answer()
            nursery.cancel_scope.cancel()

    def _answer(self) -> None:
        print(json.dumps({"errors": self._errors}), flush=True)  # noqa: T201 the test reads it

    def _note(self, *events: object) -> None:
        self._history.write(*events)  # type: ignore[arg-type]

    # --- consumers -----------------------------------------------------------------------------
    async def _consume(
        self, name: str, group: str, bindings: list[Binding], *, task_status: trio.TaskStatus[None]
    ) -> None:
        tags, random = count(1), self._random
        self._note(Opened(time.monotonic(), name, group))

        async def handle(message: Received) -> None:
            tag = next(tags)
            what = (tag, message.id.hex(), message.attempt, digest(message))
            self._note(Delivered(time.monotonic(), name, group, *what))
            if random.random() < 0.1:
                await trio.sleep(random.random() * 0.01)
            fails = not self._done and random.random() < FAILING
            self._note(Settling(time.monotonic(), name, tag, "failed" if fails else "ack"))
            if fails:
                raise ValueError("the test says so")

        client = Client(
            self._plan.registry, group=group, bindings=bindings, on_message=handle, timeout=CONSUMER_TIMEOUT_SECONDS
        )
        async with client:
            await self._bound(client, bindings)
            task_status.started()
            await trio.sleep_forever()

    async def _bound(self, client: Client, bindings: list[Binding]) -> None:
        """Wait until a client has bound its group at every broker."""
        with trio.fail_after(ENTER_SECONDS_MAX):
            await _until(lambda: set(client.statistics().connected) >= set(self._plan.there))
        noted = [[one.topic, int(one.kind), one.pattern, one.persistent] for one in bindings]
        self._note(Bound(time.monotonic(), client.group, noted, True))

    async def _bind(self, group: str, bindings: list[Binding]) -> None:
        async with Client(self._plan.registry, group=group, bindings=bindings) as client:
            await self._bound(client, bindings)

    # --- producers -----------------------------------------------------------------------------
    def _message(self) -> Message:
        random = self._random
        kind = random.choice(("paid", "sent", "back"))
        return Message(random.choice(TOPICS), kind, random.randbytes(random.choice((0, 50, 500))))

    async def _produce(self, group: str) -> None:
        """Send batches; what was not accepted is sent again until it is."""
        async with Client(self._plan.registry, group=group, topics=TOPICS, timeout=self._plan.timeout) as client:
            left: list[Message] = []
            while left or not self._done:
                left = await self._send(
                    client, group, left or [self._message() for _ in range(self._random.randint(1, 10))]
                )
                await trio.sleep(self._random.random() * PAUSE_SECONDS_MAX)

    async def _send(self, client: Client, group: str, messages: list[Message]) -> list[Message]:
        failed = await send_noted(client, group, messages, self._calls, self._note)
        self._errors += [f"{time.monotonic():.3f} send: {error!r}" for _, error in failed]
        return [message for message, _ in failed]

    # --- transactions --------------------------------------------------------------------------
    async def _bank(self) -> None:
        client = Client(
            self._plan.registry, group=BANK, topics=TOPICS, timeout=self._plan.timeout, on_check=self._check
        )
        async with client:
            async with trio.open_nursery() as nursery:
                for _ in range(BANKERS):
                    nursery.start_soon(self._transact, client)
            await self._drained.wait()  # it has to answer checks until then
            now = time.monotonic()
            self._note(*(LocalOutcome(now, one, committed) for one, committed in self._ledger.fates.items()))

    async def _check(self, message: Received) -> Decision:
        transaction, now = message.id.hex(), time.monotonic()
        committed = self._ledger.answer(transaction)
        answer = "commit" if committed else "rollback"
        self._note(Asked(now, BANK, BANK, transaction))
        self._note(DecideInvoked(now, next(self._calls), transaction, BANK, answer))
        return Decision.COMMIT if committed else Decision.ROLLBACK

    async def _transact(self, client: Client) -> None:
        while not self._done:
            messages = [self._message() for _ in range(self._random.choice((1, 1, 2)))]
            await self._transact_once(client, messages)
            await trio.sleep(self._random.random() * PAUSE_SECONDS_MAX)

    async def _transact_once(self, client: Client, messages: list[Message]) -> None:
        """Of ten transactions four are committed and three rolled back here; three are left to the check."""
        random, identity = self._random, messages[0].id.hex()
        now = time.monotonic()
        noted: list[list[object]] = [
            [one.id.hex(), one.topic, one.message_type, digest(one), one.deliver_limit] for one in messages
        ]
        self._note(HalfInvoked(now, identity, BANK, "", noted))
        transaction = client.transaction(*messages, check_after=CHECK_AFTER_SECONDS)
        call = ""
        try:
            async with transaction:
                self._begun(transaction, messages)
                await trio.sleep(random.random() * 0.01)
                how = random.random()
                self._ledger.fates[identity] = how < 0.4 or how >= 0.85
                if how >= 0.7:
                    raise _Forgotten
                call = next(self._calls)
                decision = "commit" if how < 0.4 else "rollback"
                self._note(DecideInvoked(time.monotonic(), call, identity, BANK, decision))
                if decision == "rollback":
                    await transaction.rollback()
        except _Forgotten:
            return
        except KiteQError as error:
            self._failed(identity, call, messages, error)
            return
        if transaction.outcome in {Outcome.COMMITTED, Outcome.ROLLED_BACK}:
            self._note(DecideOk(time.monotonic(), call))

    def _begun(self, transaction: Transaction, messages: list[Message]) -> None:
        assert transaction._half is not None
        ids = [one.id.hex() for one in messages]
        self._note(HalfOk(time.monotonic(), ids[0], ids, transaction._half.name))

    def _failed(self, identity: str, call: str, messages: list[Message], error: KiteQError) -> None:
        """Note that a transaction could not begin, or, if there is a `call`, not be decided."""
        now = time.monotonic()
        self._errors.append(f"{now:.3f} transaction: {error!r}")
        if not call:
            self._ledger.answer(identity)
            if isinstance(error, Refused):
                self._note(HalfRefused(now, identity, [one.id.hex() for one in messages], error.code))
        elif isinstance(error, Refused):
            self._note(DecideRefused(now, call, error.code))

    # --- the end -------------------------------------------------------------------------------
    async def _drain(self) -> None:
        """Wait until no broker has anything left, and note what each says then."""
        for load in self._loads:
            load.drain = True
        connections = [
            await open_connection(load.port, "inspector", load.history, host=load.host) for load in self._loads
        ]
        quiet = 0
        with trio.move_on_after(DRAIN_SECONDS_MAX):
            while quiet < 3:
                left = sum([await count_left(connection) for connection in connections])
                quiet = 0 if left else quiet + 1
                await trio.sleep(0.1)
        self._drained.set()
        for load in self._loads:
            load.stop = True
        for load, connection in zip(self._loads, connections, strict=True):
            load.history.write(Drained(time.monotonic(), quiet >= 3))
            await final_state(connection, load.history)
            await connection.goodbye()


class _Forgotten(Exception):
    """The program fails inside its local transaction."""


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 figures of the client, looked at a few times
        await trio.sleep(0.02)


def main() -> None:
    """Run what the plan says."""
    plan = Plan(**json.loads(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(levelname)s %(name)s %(message)s")
    folder = Path(plan.folder)
    audits = [
        History(folder / BROKER_HISTORY.format(number), mortal=True) for number in range(1, len(plan.brokers) + 1)
    ]
    with History(folder / HISTORY, mortal=True) as history:
        trio.run(Application(plan, history, audits).run)


if __name__ == "__main__":
    main()
