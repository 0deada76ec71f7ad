"""The marker's own connections: few, opened when needed, kept while they work.

Theory of operation. Each piece of work has a connection for itself. After an error the connection is closed,
which ends its transaction; after success it waits for the next piece. One that waited long is tried first,
because servers close idle connections. A forked process opens its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any, Final, Protocol, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

from kiteq_client.marker.dialects import Dialect, Executor

__all__ = [
    "CONNECTIONS_MAX",
    "IDLE_SECONDS_TRUSTED",
    "Opener",
    "OwnExecutor",
    "Runner",
    "Threaded",
    "Work",
    "limiter",
]

T = TypeVar("T")
Work = Callable[[Executor, Dialect], T]

CONNECTIONS_MAX: Final = 4
"""Connections that one marker keeps, and pieces of work that run at once from an event loop."""
IDLE_SECONDS_TRUSTED: Final = 30.0
"""A connection that waited longer is tried before it is used."""

_limiter: RunVar[anyio.CapacityLimiter] = RunVar("kiteq_marker")


def limiter() -> anyio.CapacityLimiter:
    """Return what bounds the pieces of work of this event loop."""
    found = _limiter.get(None)
    if found is None:
        found = anyio.CapacityLimiter(CONNECTIONS_MAX)
        _limiter.set(found)
    return found


class OwnExecutor(Executor, Protocol):
    """A connection of the marker's own."""

    def close(self) -> None:
        """Close it."""


class Opener(Protocol):
    """Opens connections for work in threads."""

    def open(self, lock_timeout: float) -> tuple[OwnExecutor, Dialect]:
        """Connect to the primary."""


class Runner(Protocol):
    """Does pieces of work on connections of the marker's own."""

    def run(self, work: Work[T]) -> T:
        """Do it in this thread."""

    async def arun(self, work: Work[T]) -> T:
        """Do it without holding up the event loop."""

    def close(self) -> None:
        """Close what is not in use."""

    async def aclose(self) -> None:
        """Close what is not in use."""


class Threaded:
    """Work on blocking connections; from an event loop in a thread."""

    def __init__(self, opener: Opener, lock_timeout: float) -> None:
        self._opener = opener
        self._lock_timeout = lock_timeout
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._idle: list[tuple[OwnExecutor, Dialect, float]] = []

    def run(self, work: Work[T]) -> T:
        """Do it in this thread. Raises what the driver raises."""
        executor, dialect = self._take()
        try:
            result = work(executor, dialect)
        except BaseException:
            _close(executor)
            raise
        self._give_back(executor, dialect)
        return result

    async def arun(self, work: Work[T]) -> T:
        """Do it in a thread."""
        return await anyio.to_thread.run_sync(self.run, work, limiter=limiter())

    def close(self) -> None:
        """Close what is not in use."""
        if self._pid == os.getpid():
            with self._lock:
                idle, self._idle = self._idle, []
            for executor, _, _ in idle:
                _close(executor)

    async def aclose(self) -> None:
        """Close what is not in use."""
        await anyio.to_thread.run_sync(self.close)

    def _take(self) -> tuple[OwnExecutor, Dialect]:
        if self._pid != os.getpid():
            # The parent uses the same sockets: let go of them without a word. It may have held the lock.
            _forgotten.extend(executor for executor, _, _ in self._idle)
            self._idle, self._lock, self._pid = [], threading.Lock(), os.getpid()
        with self._lock:
            found = self._idle.pop() if self._idle else None
        if found is not None:
            executor, dialect, since = found
            if monotonic() - since <= IDLE_SECONDS_TRUSTED or _works(executor):
                return executor, dialect
        executor, dialect = self._opener.open(self._lock_timeout)
        try:
            for statement in dialect.setup:
                executor.execute(statement)
        except BaseException:
            _close(executor)
            raise
        return executor, dialect

    def _give_back(self, executor: OwnExecutor, dialect: Dialect) -> None:
        if not dialect.one_thread_only:
            with self._lock:
                if len(self._idle) < CONNECTIONS_MAX:
                    self._idle.append((executor, dialect, monotonic()))
                    return
        _close(executor)


_forgotten: list[Any] = []
"""Connections of the process before a fork: to drop them would close the parent's sessions."""


def _works(executor: OwnExecutor) -> bool:
    try:
        executor.execute("SELECT 1")
    except Exception:  # noqa: BLE001 whatever it is, another connection is opened
        _close(executor)
        return False
    return True


def _close(executor: OwnExecutor) -> None:
    with suppress(Exception):  # it failed before, and is dropped either way
        executor.close()
