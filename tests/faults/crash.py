"""Runs a broker and a producer into traps, starts again what died, and waits until everything agrees."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from kiteq.binding.bindings import Binding, direct, fanout
from tests.faults.checker import check
from tests.faults.crashing_broker import KEEP_VARIABLE
from tests.faults.crashing_producer import HISTORY, TOPICS, Round, business_rows
from tests.faults.driver import DriverConnection, Lost, open_connection
from tests.faults.history import (
    BrokerStarted,
    BrokerStopped,
    Drained,
    HalfInvoked,
    History,
    LocalOutcome,
    Run,
    read_histories,
)
from tests.faults.load import final_state, note_waiting
from tests.faults.trap import BROKER, PRODUCER, note_pid, set_trap, sprung_at
from tests.support.broker import BrokerFailed, BrokerProcess

__all__ = ["Crash", "Disagreement", "crashing"]

REPOSITORY: Final = Path(__file__).parent.parent.parent
GROUPS: Final[dict[str, list[Binding]]] = {
    "books": [fanout(topic) for topic in TOPICS],
    "mail": [direct("orders", "paid")],
}
SPRUNG_SECONDS_MAX: Final = 20.0
AGREED_SECONDS_MAX: Final = 15.0
POLL_SECONDS: Final = 0.03
QUIET_SECONDS: Final = 0.1
"""So long nothing more may come once everything agrees."""


class Disagreement(Exception):
    """Something was still undecided, or waiting, when the time was up."""


class _Producer:
    """The producer's process."""

    def __init__(self, folder: Path, address: str, timeout: float) -> None:
        self._folder = folder
        self._command = [sys.executable, "-m", "tests.faults.crashing_producer", address, str(timeout)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with (self._folder / "producer.log").open("a") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'client'}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        note_pid(self._folder, PRODUCER, self._process.pid)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def begin(self, round_: Round) -> None:
        """Let it play a round."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(round_) + "\n")
        self._process.stdin.flush()

    def wait_done(self) -> bool:
        """Wait until a round is played; return False if the process ended before."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline() != ""

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()


class Crash:
    """One store, and all that happens to it."""

    def __init__(self, folder: Path, history: History, *, keep_seconds: float | None, timeout: float) -> None:
        environment = {
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'client'}",
            "KITEQ_CHECK_AFTER": "0.1s",
            "KITEQ_CHECK_ELSEWHERE_AFTER": "0.1s",
            "KITEQ_CHECKS_PER_SECOND": "10000",
        }
        if keep_seconds is not None:
            environment[KEEP_VARIABLE] = str(keep_seconds)
        self.folder = folder
        self.broker = BrokerProcess(folder, environment=environment, module="tests.faults.crashing_broker")
        self.producer = _Producer(folder, self.broker.address, timeout)
        self._history = history
        self.seen: dict[str, set[str]] = {group: set() for group in GROUPS}
        self._taking: trio.Nursery | None = None

    # --- processes --------------------------------------------------------------------------------

    async def start_broker(self) -> None:
        """Start it, and note that."""
        await trio.to_thread.run_sync(self.broker.start)
        note_pid(self.folder, BROKER, self.broker.pid)
        self._history.write(BrokerStarted(time.monotonic()))

    async def kill_broker(self) -> None:
        """Kill it from outside."""
        began = time.monotonic()
        await trio.to_thread.run_sync(self.broker.kill)
        self._history.write(BrokerStopped(time.monotonic(), began, "killed"))

    async def start_in_vain(self) -> None:
        """Start the broker into a trap of its recovery."""
        with suppress(BrokerFailed):
            await self.start_broker()

    # --- a crash ----------------------------------------------------------------------------------

    async def spring(self, point: str, victims: Sequence[str], commit: bool | None, round_: Round) -> None:
        """Let the producer play a round into a trap."""
        set_trap(self.folder, point, victims, commit=commit)
        self.producer.begin(round_)
        await self.wait_sprung(point, victims)

    async def wait_sprung(self, point: str, victims: Sequence[str]) -> None:
        """Wait until the trap was sprung and its victims are gone; note it."""
        with trio.move_on_after(SPRUNG_SECONDS_MAX):
            while sprung_at(self.folder) is None:  # noqa: ASYNC110 a file of another process
                await trio.sleep(0.005)
        at = sprung_at(self.folder)
        assert at is not None, f"{point} was not reached; the broker's log:\n{self.broker.log()}"
        if BROKER in victims:
            await trio.to_thread.run_sync(self.broker.wait)
            self._history.write(BrokerStopped(time.monotonic(), at, "killed"))
        if PRODUCER in victims:
            while self.producer.is_running:  # noqa: ASYNC110 the end of another process
                await trio.sleep(0.002)
            await trio.to_thread.run_sync(self.producer.close)

    async def play(self, round_: Round) -> None:
        """Let the producer play a round to its end."""
        self.producer.begin(round_)
        with trio.fail_after(SPRUNG_SECONDS_MAX):
            assert await trio.to_thread.run_sync(self.producer.wait_done), "the producer has ended"

    async def restart(self) -> None:
        """Start again what died; look at what the broker says while no producer is there."""
        if not self.broker.is_running:
            await self.start_broker()
        if not self.producer.is_running:
            await self.look()
            self.producer.start()

    async def inspector(self) -> DriverConnection:
        """Return a connection for questions about the broker."""
        return await open_connection(self.broker.port, "inspector", self._history)

    async def look(self) -> None:
        """Note what the broker counts as waiting."""
        inspector = await self.inspector()
        await note_waiting(inspector, self._history)
        await inspector.goodbye()

    # --- the end ----------------------------------------------------------------------------------

    def begun(self) -> dict[str, list[tuple[str, str]]]:
        """Return the messages `(id, group)` that each transaction owes once it is committed."""
        owed: dict[str, list[tuple[str, str]]] = {}
        path = self.folder / HISTORY
        for event in read_histories([path]) if path.exists() else ():
            if isinstance(event, HalfInvoked):
                owed.setdefault(event.transaction, []).extend(
                    (str(identity), group)
                    for identity, topic, message_type, *_ in event.messages
                    for group in GROUPS
                    if group == "books" or (topic, message_type) == ("orders", "paid")
                )
        return owed

    async def agree(self) -> None:
        """Wait until nothing is undecided and nothing waits. Raises `Disagreement` when that does not come in time."""
        deadline = time.monotonic() + AGREED_SECONDS_MAX
        inspector = await self.inspector()
        agreed_at = 0.0
        while (now := time.monotonic()) < deadline and (not agreed_at or now < agreed_at + QUIET_SECONDS):
            groups = await inspector.admin("group.list")
            is_quiet = not any(row["pending"] + row["in_flight"] + row["retrying"] for row in groups)
            is_quiet = is_quiet and not await inspector.admin("tx.list")
            is_quiet = is_quiet and not (await inspector.admin("stat"))["delayed"]["messages"]
            agreed_at = (agreed_at or now) if is_quiet else 0.0
            await trio.sleep(POLL_SECONDS)
        await inspector.goodbye()
        if not agreed_at:
            raise Disagreement

    async def finish(self, *, agreed: bool) -> None:
        """Note how everything ended."""
        await trio.to_thread.run_sync(self.producer.close)
        inspector = await self.inspector()
        rows = business_rows(self.folder)
        for identity in self.begun():
            self._history.write(LocalOutcome(time.monotonic(), identity, identity in rows))
        self._history.write(Drained(time.monotonic(), agreed))
        await final_state(inspector, self._history)
        await inspector.goodbye()

    async def consume(self, group: str) -> None:
        """Take and ack what comes to a group, through all ends of the broker."""
        while True:
            with suppress(Lost):
                connection = await open_connection(self.broker.port, group, self._history, bindings=GROUPS[group])
                await self._take(connection)
            await trio.sleep(POLL_SECONDS)

    async def _take(self, connection: DriverConnection) -> None:
        try:
            await connection.credit(100)
            while True:
                arrived = await connection.receive()
                self.seen[connection.group].update(arrival.id for arrival in arrived)
                with trio.CancelScope(shield=True):
                    if arrived:
                        await connection.ack([arrival.tag for arrival in arrived])
        finally:
            with trio.CancelScope(shield=True):
                await connection.drop()


@asynccontextmanager
async def crashing(folder: Path, *, keep_seconds: float | None = None, timeout: float = 5.0) -> AsyncIterator[Crash]:
    """Run a broker, a producer and two consuming groups; leaving judges what was seen.

    keep_seconds: how long the broker keeps decisions. timeout: of the producer's client, in seconds.
    """
    path = folder / "history.jsonl"
    with History(path) as history:
        history.write(Run(time.monotonic(), 60.0, resends=True))
        crash = Crash(folder, history, keep_seconds=keep_seconds, timeout=timeout)
        try:
            await crash.start_broker()
            for group, bindings in GROUPS.items():
                await (await open_connection(crash.broker.port, group, history, bindings=bindings)).goodbye()
            crash.producer.start()
            async with trio.open_nursery() as nursery:
                for group in GROUPS:
                    nursery.start_soon(crash.consume, group)
                agreed = True
                try:
                    yield crash
                    await crash.agree()
                except Disagreement:
                    agreed = False  # what the checker says is worth more
                await crash.finish(agreed=agreed)
                nursery.cancel_scope.cancel()
        finally:
            crash.producer.close()
            crash.broker.close()
    assert [str(violation) for violation in check(read_histories([path, folder / HISTORY]))] == []
    assert agreed, "something was still undecided, or waiting"
