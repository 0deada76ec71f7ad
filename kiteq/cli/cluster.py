"""The brokers that a command is about, asked together."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import typer

from kiteq.cli.failing import STATUS_FAILED, CommandFailed
from kiteq.cli.finding import Announced, open_source
from kiteq.cli.output import table
from kiteq.cli.session import AdminSession
from kiteq.errors import KiteQError, NotConnected, Refused

__all__ = ["Cluster", "Told", "in_threads", "state_of_error", "together"]

THREADS_MAX: Final = 32
"""Brokers asked at once."""
UNKNOWN: Final = frozenset({"unknown_group", "unknown_message", "unknown_transaction"})
"""Refusals that say only that another broker has it."""

One = TypeVar("One")
Outcome = TypeVar("Outcome")


class Told(NamedTuple):
    """What a broker answered."""

    broker: str
    result: Any


def state_of_error(error: KiteQError) -> str:
    """Return what to call the state of a broker that does not answer as it should."""
    if isinstance(error, Refused):
        return "draining" if error.code == "draining" else "refused"
    return "not reached"


def in_threads(work: Callable[[One], Outcome], each: Sequence[One]) -> list[Outcome]:
    """Call `work` for each one at the same time; return in order what it returns, or raise what it raises."""
    if len(each) < 2:
        return list(map(work, each))
    futures: list[Future[Outcome]] = [Future() for _ in each]
    left = deque(zip(each, futures, strict=True))

    def take_and_work() -> None:
        with suppress(IndexError):  # nothing is left
            while True:
                one, future = left.popleft()
                try:
                    future.set_result(work(one))
                except BaseException as error:  # noqa: BLE001 it is raised where the result is taken
                    future.set_exception(error)

    # Daemons, unlike those of an executor: Ctrl-C does not wait for a broker that does not answer.
    for _ in range(min(THREADS_MAX, len(each))):
        threading.Thread(target=take_and_work, daemon=True).start()
    return [future.result() for future in futures]


def together(work: Callable[[One], Outcome], each: Sequence[One]) -> list[Outcome | KiteQError]:
    """Call `work` as `in_threads` does; return in order what came of it, an error of kiteq too."""

    def tried(one: One) -> Outcome | KiteQError:
        try:
            return work(one)
        except KiteQError as error:
            return error

    return in_threads(tried, each)


class Cluster:
    """Use it as `with Cluster("zk://127.0.0.1") as brokers: brokers.ask("stat")`.

    With one broker every error is raised. With more, what one of them cannot do is a line on standard
    error, the others are asked all the same, and at the end of the block the command ends with status 1.
    needs_one: whether the command ends at once when none of several is reached.
    """

    def __init__(self, named: str, *, needs_one: bool = True) -> None:
        self._named = named
        self._needs_one = needs_one
        self._sessions: list[AdminSession] = []
        self._copies: list[tuple[str, str, str]] = []
        self._failed = False
        self._life = ExitStack()
        self.failures: dict[str, KiteQError] = {}
        """Why brokers cannot be asked, by address."""
        self.announced: dict[str, Announced] = {}
        """What the registry says, by address; empty without one."""

    def __enter__(self) -> Self:
        with ExitStack() as life:
            with open_source(self._named) as source:
                found = source.brokers()
            self.announced = {address: one for address, one in found.items() if one is not None}
            if not found:
                raise NotConnected(f"no broker is announced in {self._named}; was one started with this --zkhost?")
            self._reach(list(found), life)
            if not self._sessions and len(self.failures) == 1 and (self._needs_one or not self.announced):
                raise next(iter(self.failures.values()))
            for address, error in self.failures.items():
                self.tell(address, error)
            for address, twin, broker_id in self._copies:
                sentence = f"{address} is left out: it is broker {broker_id} as {twin} is; "
                self.tell(address, KiteQError(f"{sentence}does another process run on a copy of its store?"))
            if not self._sessions and self._needs_one:
                raise typer.Exit(STATUS_FAILED)
            self._life = life.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._life.close()
        if kind is None and self._failed:
            raise typer.Exit(STATUS_FAILED)

    def _reach(self, addresses: list[str], life: ExitStack) -> None:
        """Connect to these brokers and to the sets they belong to, to each once; a registry has all of a set."""
        known = dict.fromkeys(addresses)
        reached: dict[str, str] = {}
        while addresses:
            sessions = [AdminSession(address) for address in addresses]
            addresses = []
            for session, outcome in zip(sessions, together(AdminSession.open, sessions), strict=True):
                if outcome is not None:
                    self.failures[session.address] = outcome
                    continue
                life.callback(session.close)
                twin = reached.setdefault(session.broker_id, session.address)
                if twin != session.address:  # reached under another address already
                    if {twin, session.address} <= self.announced.keys():
                        self._copies.append((session.address, twin, session.broker_id))
                    continue
                self._sessions.append(session)
                if self.announced:
                    continue
                addresses += [one for one in session.neighbours if one not in known]
                known |= dict.fromkeys(session.neighbours)
            addresses = list(dict.fromkeys(addresses))

    @property
    def several(self) -> bool:
        """Whether there is more than one broker, reached or not."""
        return len(self._sessions) + len(self.failures) > 1

    @property
    def sessions(self) -> list[AdminSession]:
        """The connections to those that were reached."""
        return list(self._sessions)

    def tell(self, address: str, error: KiteQError) -> None:
        """Say what a broker cannot do."""
        self._failed = True
        text = str(error)
        print(f"kiteq: {text if address in text else f'{address}: {text}'}", file=sys.stderr, flush=True)

    def ask(self, verb: str, **arguments: Any) -> list[Told]:
        """Ask every broker; return the answers of those that know what it is about.

        Raises the error when there is no answer.
        """
        outcomes = together(lambda session: session.ask(verb, **arguments), self._sessions)
        answers: list[Told] = []
        unknown: list[KiteQError] = []
        failed: list[tuple[str, KiteQError]] = []
        for session, outcome in zip(self._sessions, outcomes, strict=True):
            if isinstance(outcome, Refused) and outcome.code in UNKNOWN:
                unknown.append(outcome)
            elif isinstance(outcome, KiteQError):
                failed.append((session.address, outcome))
            else:
                answers.append(Told(session.address, outcome))
        raised: KiteQError | None = None
        if not answers:
            raised = unknown[0] if unknown else failed.pop(0)[1]
        for address, error in failed:
            self.tell(address, error)
        if raised is not None:
            raise raised
        return answers

    def ask_holder(self, holds: str, verb: str, *, id: str, **arguments: Any) -> Told:
        """Ask the broker that knows an id, which is found out with the verb `holds` when there are several."""
        holder = self._sessions[0].address if len(self._sessions) == 1 else self.ask(holds, id=id)[0].broker
        session = next(one for one in self._sessions if one.address == holder)
        return Told(holder, session.ask(verb, id=id, **arguments))

    def rows(self, answers: Iterable[Told]) -> list[dict[str, Any]]:
        """Return the rows of lists, each with its broker when there are several."""
        return [self.marked(told.broker, row) for told in answers for row in told.result]

    def marked(self, broker: str, row: dict[str, Any]) -> dict[str, Any]:
        """Return a row with its broker when there are several."""
        return {"broker": broker, **row} if self.several else row

    def table(
        self, titles: Sequence[str], rows: Sequence[dict[str, Any]], cells: Callable[[dict[str, Any]], Sequence[object]]
    ) -> str:
        """Return rows in columns, the first one for the broker when there are several."""
        if not self.several:
            return table(titles, [cells(row) for row in rows])
        return table(("BROKER", *titles), [(row["broker"], *cells(row)) for row in rows])

    def only_one(self, what: str) -> AdminSession:
        """Return the connection to the broker that was named; `what` cannot be done to several at once."""
        if len(self._named.removeprefix("kiteq://").split(",")) == 1 and not self.announced:
            return self._sessions[0]
        known = ", ".join([*(one.address for one in self._sessions), *self.failures])
        raise CommandFailed(f"{what} is done to one broker: name it with --broker HOST:PORT; there are {known}")
