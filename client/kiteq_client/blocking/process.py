"""What the blocking clients of one process share, and what a fork and the end of the process do to it.

Theory of operation. `here()` gives the `Process` that belongs to the present pid. After a fork the child
has a new one: new lock, no thread, no connection; of the old one it closes its copies of the descriptors
and touches nothing else. Each `Live` belongs to one `Process`, so a client sees by comparing that what it
opened belongs to its parent. The event loop takes the lock too, so nobody who holds it may wait for the
loop, except for the start of a new one.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import Final

import anyio

from kiteq.errors import ClientClosed
from kiteq.limits import DRAIN_SECONDS
from kiteq_client.blocking.portal import Portal, after_fork_in_child, after_fork_in_parent, before_fork
from kiteq_client.blocking.threads import Threads
from kiteq_client.client import Client

__all__ = ["Live", "Process", "here"]

logger = logging.getLogger("kiteq_client")

EXIT_SECONDS_MAX: Final = DRAIN_SECONDS + 5
"""How long the end of the interpreter waits for clients that nobody closed."""


class Process:
    """The portal of a process and the clients that are open in it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.portal: Portal | None = None
        self.lives: set[Live] = set()

    def open(self, live: Live) -> None:
        """Begin the life of a client; call it with the lock held."""
        if self.portal is None:
            self.portal = Portal()
        live.portal = self.portal
        self.lives.add(live)
        self.portal.spawn(live.run)

    def closed(self, live: Live) -> Portal | None:
        """Note that a life ended; return the portal if nobody needs it any more."""
        with self.lock:
            self.lives.discard(live)
            if self.lives or self.portal is not live.portal:
                return None
            portal, self.portal = self.portal, None
            return portal


class Live:
    """An async client that was entered, until it has left; all of it in one task of the portal.

    make: makes the client, in the event loop. concurrency: how many handlers run at a time.
    """

    portal: Portal

    def __init__(self, process: Process, make: Callable[[Threads], Client], concurrency: int) -> None:
        self.process = process
        self.opened: Future[Client] = Future()
        self.ended: Future[None] = Future()
        self._make = make
        self._concurrency = concurrency
        self._closing: anyio.Event | None = None
        self._scope: anyio.CancelScope | None = None
        self._is_leaving = False

    async def run(self) -> None:
        """Enter the client, wait for `leave`, leave it."""
        try:
            await self._enter_and_leave()
        finally:
            self._not_opened(ClientClosed("the client was closed before it was connected"))
            portal = self.process.closed(self)
            if portal is not None:
                portal.stop()
            self.ended.set_result(None)

    async def _enter_and_leave(self) -> None:
        threads = Threads(self._concurrency)
        self._closing = anyio.Event()
        try:
            with anyio.CancelScope() as self._scope:
                if not self._is_leaving:
                    async with self._make(threads) as client:
                        self.opened.set_result(client)
                        await self._closing.wait()
        except Exception as error:  # noqa: BLE001 raised by everybody who waits for the opening
            self._not_opened(error)
        finally:
            threads.close()

    def _not_opened(self, error: Exception) -> None:
        if not self.opened.done():
            self.opened.set_exception(error)
        elif self.opened.exception() is None and not isinstance(error, ClientClosed):
            logger.error("leaving failed", exc_info=error)

    @property
    def is_over(self) -> bool:
        """Whether it could not be opened, or has ended."""
        return self.ended.done() or (self.opened.done() and self.opened.exception() is not None)

    def leave(self) -> None:
        """Ask the client to leave; returns at once."""
        self.portal.call_soon(self._leave)

    def _leave(self) -> None:
        self._is_leaving = True
        if self.opened.done():
            if self._closing is not None:
                self._closing.set()
        elif self._scope is not None:
            self._scope.cancel()

    def wait_ended(self, timeout: float | None = None) -> None:
        """Return when the client has left. Raises `TimeoutError` after `timeout` seconds."""
        self.ended.result(timeout)
        self.portal.join_if_stopping()


_process = Process()
_inherited: list[Process] = []
"""Of the parent, kept for ever: nothing in it may be finalized here, as it stands for the parent's things."""


def here() -> Process:
    """Return the `Process` of the present pid."""
    if _process.pid != os.getpid():
        # A fork that did not run Python's hooks.
        _begin_anew()
    return _process


def _begin_anew() -> None:
    global _process  # there is one for each process
    inherited, _process = _process, Process()
    _inherited.append(inherited)
    after_fork_in_child()


def _close_all() -> None:
    """Leave every client that is still open, within a bounded time."""
    if _process.pid != os.getpid():
        return
    deadline = monotonic() + EXIT_SECONDS_MAX
    lives = list(_process.lives)
    for live in lives:
        live.leave()
    for live in lives:
        try:
            live.wait_ended(max(0, deadline - monotonic()))
        except TimeoutError:
            logger.warning("a client was not closed within %g s of the end of the program", EXIT_SECONDS_MAX)


os.register_at_fork(before=before_fork, after_in_parent=after_fork_in_parent, after_in_child=_begin_anew)
atexit.register(_close_all)
