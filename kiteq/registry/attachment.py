"""Between an event loop and the keeper's thread: trio or asyncio, whichever runs."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Generic, TypeVar

import anyio

from kiteq.registry.errors import CredentialsRefused, RegistryError, RegistryUnavailable
from kiteq.registry.keeper import Keeper, Report, Request
from kiteq.registry.state import RegistryState

__all__ = ["Attachment"]

View = TypeVar("View")
CLOSE_SECONDS_MAX: Final = 2.0
"""A ZooKeeper that does not answer must not hold up the end of a process: the session ends by itself."""


def loop_caller() -> Callable[..., Any]:
    """Return what runs a function in the running loop, from any thread."""
    if "trio" in sys.modules:
        import trio

        with suppress(RuntimeError):
            return trio.lowlevel.current_trio_token().run_sync_soon
    return asyncio.get_running_loop().call_soon_threadsafe


class Attachment(Generic[View]):
    """The loop's end of a keeper. view: what was told last, None until ZooKeeper was read."""

    def __init__(self) -> None:
        self.view: View | None = None
        self.taken = 0
        self.asked = 0
        self._keeper: Keeper[View] | None = None
        self._call = loop_caller()
        self._waiting: dict[Request, anyio.Event] = {}
        self._turned = anyio.Event()
        self._problem: RegistryError | None = RegistryUnavailable("the registry was not tried yet")
        self._changed = anyio.Event()
        self._closed = anyio.Event()

    def tell(self, report: Report[View]) -> None:
        """Take what a turn has brought; called in the keeper's thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._call(self._take, report)

    def _take(self, report: Report[View]) -> None:
        self._problem = report.problem
        if report.problem is None:
            self.taken = report.taken
        if report.view is not None:
            self.view = report.view
            self._changed.set()
        for request in report.done:
            self._waiting.pop(request).set()
        self._turned.set()
        self._turned = anyio.Event()

    @asynccontextmanager
    async def running(self, keeper: Keeper[View], bell: threading.Event, timeout: float) -> AsyncIterator[None]:
        """Run the keeper's thread; enters when the registry was read, or cannot be within `timeout` seconds.

        Raises `CredentialsRefused`. Leaving ends the session.
        """
        self._keeper = keeper
        thread = threading.Thread(target=keeper.run, args=(bell, self._end), name="kiteq-registry", daemon=True)
        thread.start()
        try:
            with anyio.move_on_after(timeout):
                while self._problem is not None and not isinstance(self._problem, CredentialsRefused):
                    await self._turned.wait()
            if isinstance(self._problem, CredentialsRefused):
                raise self._problem
            yield
        finally:
            keeper.close()
            with anyio.move_on_after(CLOSE_SECONDS_MAX, shield=True):
                await self._closed.wait()

    def _end(self) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._call(self._closed.set)

    def state(self) -> RegistryState:
        """Return whether the registry is as it should be."""
        assert self._keeper is not None
        return self._keeper.state()

    def ask(self, apply: Callable[[], None], finished: Callable[[], bool]) -> Request:
        """Have something done, and come back at once; `wait_done` waits for it."""
        assert self._keeper is not None
        request = Request(apply, finished)
        self._waiting[request] = anyio.Event()
        self.asked += 1
        self._keeper.ask(request)
        return request

    async def wait_done(self, request: Request, timeout: float) -> None:
        """Wait until a request is done. Raises why it is not: at once when the registry does not answer."""
        event = self._waiting.get(request)
        if event is not None:
            with anyio.move_on_after(timeout):
                await event.wait()
            if not event.is_set():
                request.abandoned = True
                reason = self.state().reason or "the registry takes long"
                raise RegistryUnavailable(f"not done within {timeout:g} s: {reason}")
        if request.error is not None:
            raise request.error

    async def wait_changed(self) -> View:
        """Wait until there is something that was not returned here before, and return all of it."""
        await self._changed.wait()
        self._changed = anyio.Event()
        assert self.view is not None
        return self.view
