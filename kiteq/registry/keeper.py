"""The one thread that talks to the registry: a turn after each ring of the bell, and every half minute.

Theory of operation. Watches, changes of the connection and requests of this process only ring. A turn
takes the requests, brings ZooKeeper to what is wanted, reads what has changed, and reports. What one turn
could not do, the next one does: nothing has to be asked for twice, and a lost ring costs half a minute.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from kiteq.errors import KiteQError
from kiteq.registry.errors import RegistryError, RegistryUnavailable
from kiteq.registry.log import Log
from kiteq.registry.session import ZooKeeperSession
from kiteq.registry.state import RegistryState

__all__ = ["Keeper", "Part", "Report", "Request"]

View = TypeVar("View")
FULL_SECONDS: Final = 30.0
"""Everything is read again this often: watches are fast, this is sure."""
FULL_SHARE: Final = 0.02
"""Of the time, at most, for that: ten thousand nodes take seconds, in which nothing is written."""
RETRY_SECONDS: Final = 1.0
OVER_MARGIN_SECONDS: Final = 0.01
"""The bell for the end of a session rings just after it."""


class Part(Protocol):
    """Something that is kept in the registry, or copied from it."""

    @property
    def unfinished(self) -> bool:
        """Whether the next turn has to come soon, though nothing rings."""

    @property
    def problem(self) -> RegistryError | None:
        """Why the part is not as it should be, though the registry answers."""

    def refresh(self, *, full: bool) -> bool:
        """Do one turn; return whether there is something new to tell.

        Raises `RegistryUnavailable` and `CredentialsRefused`; the next turn is full then.
        """


@dataclass(eq=False, slots=True)
class Request:
    """Something to do, in the keeper's thread. apply: changes what is wanted.

    finished: tells after a turn whether it is done; raises why it cannot be done.
    abandoned: nobody waits for it any more; what it has changed stays.
    """

    apply: Callable[[], None]
    finished: Callable[[], bool]
    error: KiteQError | None = None
    abandoned: bool = False


@dataclass(frozen=True, slots=True)
class Report(Generic[View]):
    """What a turn has brought. taken: how many requests turns have taken by now. done: those that are over.

    view: of all parts, None when nothing has changed.
    """

    problem: RegistryError | None
    view: View | None
    taken: int
    done: tuple[Request, ...]


class Keeper(Generic[View]):
    """Keeps parts in the registry. view: makes what is told of them.

    tell: called in the keeper's thread after each turn; it must not block. full_seconds: how often
    everything is read again.
    """

    def __init__(
        self,
        session: ZooKeeperSession,
        parts: Sequence[Part],
        view: Callable[[], View],
        log: Log,
        tell: Callable[[Report[View]], None],
        full_seconds: float = FULL_SECONDS,
    ) -> None:
        self._session = session
        self._parts = parts
        self._view = view
        self._log = log
        self._tell = tell
        self._full_seconds = full_seconds
        self._asked: deque[Request] = deque()
        self._open: list[Request] = []
        self._taken = 0
        self._closing = False
        self._changed = False
        self._problem: RegistryError | None = None
        self._problem_since = 0.0
        self._unusable: RegistryError | None = RegistryUnavailable("not tried yet")
        self._connections_read = 0
        self._full_at = 0.0

    def state(self) -> RegistryState:
        """Return whether the registry is as it should be; called by any thread."""
        connection = self._session.connection()
        problem = self._problem
        if not connection.connected:
            # A refused login is tried again with a new connection, which lives for a moment: that is no news.
            return RegistryState(
                degraded=True,
                since=connection.since if problem is None else min(connection.since, self._problem_since),
                session_over=connection.session_over,
                reason=str(problem) if problem is not None else connection.reason,
            )
        if problem is not None:
            return RegistryState(degraded=True, since=self._problem_since, session_over=False, reason=str(problem))
        return RegistryState(degraded=False, since=connection.since, session_over=False, reason="")

    def ask(self, request: Request) -> None:
        """Have something done in the next turn; called by any thread."""
        self._asked.append(request)
        self._session.ring()

    def close(self) -> None:
        """Have the thread end the session and itself; called by any thread."""
        self._closing = True
        self._session.ring()

    def run(self, bell: threading.Event, closed: Callable[[], None]) -> None:
        """Be the thread, until it is closed."""
        seconds: float | None = 0.0
        while not self._closing:
            bell.wait(seconds)
            bell.clear()
            if not self._closing:
                seconds = self._turn()
        self._session.close()
        closed()

    def _turn(self) -> float:
        """Do one turn; return how long the bell may be silent."""
        while self._asked:
            request = self._asked.popleft()
            request.apply()
            self._open.append(request)
            self._taken += 1
        problem: RegistryError | None = None
        try:
            self._refresh()
        except RegistryError as error:
            problem = error
        except Exception as error:  # noqa: BLE001 a defect must not end the thread: it is told, and tried again
            problem = RegistryError(f"a defect in the registry: {error!r}")
        if problem is not None:
            self._full_at = 0.0
        self._note(problem)
        view = self._view() if self._changed and problem is None else None
        self._changed &= problem is not None
        self._tell(Report(problem, view, self._taken, self._done(problem)))
        left = self._full_at - time.monotonic()
        if problem is not None or any(part.unfinished for part in self._parts):
            left = RETRY_SECONDS
        until_over = self._session.seconds_until_over()
        return left if until_over is None else min(left, until_over + OVER_MARGIN_SECONDS)

    def _refresh(self) -> None:
        self._session.ensure()
        connections = self._session.connections
        started = time.monotonic()
        full = connections != self._connections_read or started >= self._full_at
        if connections != self._connections_read:
            self._session.prove()
        if full:
            self._session.catch_up()
        for part in self._parts:
            self._changed |= part.refresh(full=full)
        if full:
            self._connections_read = connections
            now = time.monotonic()
            self._full_at = now + max(self._full_seconds, (now - started) / FULL_SHARE)

    def _done(self, problem: RegistryError | None) -> tuple[Request, ...]:
        done: list[Request] = []
        still_open: list[Request] = []
        for request in self._open:
            (done if self._is_over(request, problem) else still_open).append(request)
        self._open = still_open
        return tuple(done)

    @staticmethod
    def _is_over(request: Request, problem: RegistryError | None) -> bool:
        if problem is not None:
            request.error = type(problem)(*problem.args)  # each is raised elsewhere
            return True
        try:
            return request.abandoned or request.finished()
        except KiteQError as error:
            request.error = error
            return True

    def _note(self, unusable: RegistryError | None) -> None:
        """Keep what is wrong for `state`, and log whether the registry can be used, once."""
        problem = unusable or next((part.problem for part in self._parts if part.problem is not None), None)
        if self._problem is None and problem is not None:
            self._problem_since = time.monotonic()
        self._problem = problem
        if str(unusable) == str(self._unusable):
            return
        self._unusable = unusable
        if unusable is None:
            self._log.info("the registry can be used", registry=str(self._session.address))
        else:
            self._log.warning("the registry cannot be used; going on with what is known", reason=str(unusable))
