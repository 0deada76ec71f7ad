"""Threads in which the plain functions of a blocking client run.

Theory of operation. A call gets a thread of its own; threads that are done wait for the next call. A
thread cannot be killed: when the waiting task is cancelled, because the handler ran too long or the
client leaves, the function runs on, nobody looks at its result, and another thread takes its place.
How many such leftovers there may be is limited. All state is touched in the event loop only.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from time import monotonic
from typing import Any, Final

import anyio

__all__ = ["Threads", "is_handler_thread"]

logger = logging.getLogger("kiteq_client")

LEFTOVERS_MAX: Final = 100
"""Functions nobody waits for that may still run, per client; more calls wait until one of them ends."""

_current = threading.local()


def is_handler_thread() -> bool:
    """Whether the caller runs in a thread of any client."""
    return getattr(_current, "pid", None) == os.getpid()


class _Job:
    """One call of a function."""

    __slots__ = ("abandoned", "arguments", "began", "done", "error", "function", "result")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.done = anyio.Event()
        self.abandoned = False
        self.began = monotonic()
        self.result: Any = None
        self.error: BaseException | None = None

    def execute(self) -> None:
        """Call the function and keep what comes of it."""
        try:
            self.result = self.function(*self.arguments)
            if inspect.iscoroutine(self.result):
                self.result.close()
                self.error = TypeError(f"{self.function!r} returned a coroutine: give plain functions, not `async def`")
        except BaseException as error:  # noqa: BLE001 raised again where the result is waited for
            self.error = error


class Threads:
    """The threads of one client; make it in the event loop.

    concurrency: how many calls are expected at a time.
    """

    def __init__(self, concurrency: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._limiter = anyio.CapacityLimiter(concurrency + LEFTOVERS_MAX)
        self._idle: list[SimpleQueue[_Job | None]] = []
        self._pid = os.getpid()
        self._closed = False
        self._started = 0

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in a thread; return what it returns or raise what it raises.

        When cancelled it stops waiting; the function runs on.
        """
        job = _Job(function, arguments)
        await self._limiter.acquire_on_behalf_of(job)
        try:
            self._hand_over(job)
        except BaseException:
            self._limiter.release_on_behalf_of(job)
            raise
        try:
            await job.done.wait()
        except asyncio.CancelledError:
            job.abandoned = True
            logger.warning(
                "%s still runs after %.1f s: its thread cannot be stopped, and its result will be ignored",
                _name(function), monotonic() - job.began,
            )  # fmt: skip
            raise
        if job.error is not None:
            raise job.error
        return job.result

    def close(self) -> None:
        """End the threads: the idle ones now, the others when their function returns."""
        self._closed = True
        while self._idle:
            self._idle.pop().put(None)

    def _hand_over(self, job: _Job) -> None:
        if self._idle:
            self._idle.pop().put(job)
            return
        inbox: SimpleQueue[_Job | None] = SimpleQueue()
        inbox.put(job)
        self._started += 1
        # A daemon: a function that never returns must not keep the interpreter from ending.
        threading.Thread(target=self._work, args=(inbox,), name=f"kiteq-handler-{self._started}", daemon=True).start()

    def _work(self, inbox: SimpleQueue[_Job | None]) -> None:
        _current.pid = self._pid
        while (job := inbox.get()) is not None:
            job.execute()
            if os.getpid() != self._pid:
                return  # the function forked: this is the child, and the message belongs to the parent
            try:
                self._loop.call_soon_threadsafe(self._finished, job, inbox)
            except RuntimeError:
                return  # the loop has ended: the client left long before this function did
            del job

    def _finished(self, job: _Job, inbox: SimpleQueue[_Job | None]) -> None:
        self._limiter.release_on_behalf_of(job)
        if self._closed:
            inbox.put(None)
        else:
            self._idle.append(inbox)
        if job.abandoned:
            took_s = monotonic() - job.began
            logger.warning("%s ended after %.1f s; its result is ignored", _name(job.function), took_s)
        job.done.set()


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
