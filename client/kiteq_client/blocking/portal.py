"""The event loop thread that blocking clients share.

Theory of operation. One daemon thread runs an asyncio loop; a call of another thread becomes a task there,
and a future tells its result. Handing a call over waits for nothing, unlike anyio's own portal, so it may be
done under a lock that the loop takes too; and each future gets a result, even if the loop ends first. A fork
copies the loop's descriptors but not the thread. So a fork waits until the loop waits: then nothing is half done there,
no lock is held by it, and every socket is known. The child closes its copies with a plain close: that
sends nothing, ends no connection of the parent, and does not touch what the parent's selector watches.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from contextvars import Context
from importlib import import_module
from typing import Any, Final, TypeVar
from weakref import WeakSet

import anyio

from kiteq.errors import ClientClosed

__all__ = [
    "Portal", "after_fork_in_child", "after_fork_in_parent", "before_fork", "refuse_event_loop",
]  # fmt: skip

logger = logging.getLogger("kiteq_client")

# What the first use in a thread would import: a fork in that moment would leave the child with half a module.
for _name in ("anyio._backends._asyncio", "encodings.idna"):
    import_module(_name)

T = TypeVar("T")
JOIN_SECONDS_MAX: Final = 5.0
"""How long a stopped thread is waited for; a name lookup that hangs may hold it."""
FORK_SECONDS_MAX: Final = 1.0
"""How long a fork waits for an event loop that is busy; it seldom is for a millisecond."""


class _Selector(selectors.DefaultSelector):
    """A selector that gives its turn away while it waits."""

    def __init__(self, turn: threading.Lock) -> None:
        super().__init__()
        self._turn = turn

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turn.release()
        try:
            return super().select(timeout)
        finally:
            self._turn.acquire()


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that a fork can wait for, and whose descriptors the child can give back.

    `turn` is held by the thread of the loop, but for the time it waits.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.turn.acquire()
        self.thread = threading.get_ident()
        _loops[self.thread] = self
        self._connecting: WeakSet[socket.socket] = WeakSet()
        self._watching = _Selector(self.turn)
        super().__init__(self._watching)

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        self._connecting.add(sock)
        await super().sock_connect(sock, address)

    def close_copies(self) -> None:
        """Close everything this loop has open; for the forked process, where the loop does not run."""
        own_pipe = (getattr(self, "_ssock", None), getattr(self, "_csock", None))
        for sock in (*self._connecting, *own_pipe):
            if sock is not None:
                sock.close()
        # Not loop.close(): that would take the pipe out of the selector, which is the parent's too.
        self._watching.close()


_loops: dict[int, _Loop] = {}
"""The loops of this process, by thread: one, but for moments in which one ends and the next begins."""
_forking = threading.local()


def before_fork() -> None:
    """Wait until the loops wait, or for a second; then the fork is taken anyway."""
    _forking.turns = [
        loop.turn
        for loop in list(_loops.values())
        if loop.thread != threading.get_ident() and loop.turn.acquire(timeout=FORK_SECONDS_MAX)
    ]


def after_fork_in_parent() -> None:
    """Let the loops go on."""
    for turn in _forking.turns:
        turn.release()
    _forking.turns = []


def after_fork_in_child() -> None:
    """Give back the copies of what the loops of the parent have open."""
    loops = list(_loops.values())
    _loops.clear()
    # Kept for ever: nothing of them may be finalized here, as it stands for the parent's things.
    _inherited.extend(loops)
    for loop in loops:
        loop.close_copies()


_inherited: list[_Loop] = []


class Portal:
    """A running event loop thread; constructing it starts the thread.

    Raises `RuntimeError` if no thread can be started, or threads are replaced by gevent or eventlet.
    """

    def __init__(self) -> None:
        _refuse_green_threads()
        self._loop: _Loop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._over: anyio.Event
        self._stopping = False
        self._ended = False
        self._waiting: set[Future[Any]] = set()
        self._started: Future[_Loop] = Future()
        self._thread = threading.Thread(target=self._run, name="kiteq-client", daemon=True)
        self._thread.start()
        self._loop = self._started.result()

    def _run(self) -> None:
        try:
            anyio.run(self._serve, backend="asyncio", backend_options={"loop_factory": _Loop})
        except BaseException as error:
            if self._started.done():
                logger.exception("the event loop of the blocking clients failed")
            else:
                self._started.set_exception(error)
        finally:
            loop = _loops.pop(threading.get_ident(), None)
            if loop is not None:
                loop.turn.release()
            self._ended = True
            self._end_waiting()

    async def _serve(self) -> None:
        self._over = anyio.Event()
        self._started.set_result(_loops[threading.get_ident()])
        await self._over.wait()
        # Returning cancels the tasks there still are.

    def _end_waiting(self) -> None:
        """End the calls that were handed over too late."""
        for future in list(self._waiting):
            _settle(future, error=ClientClosed("the client was closed before this call was begun"))

    # --- for other threads ---------------------------------------------------------------------
    def submit(self, work: Callable[..., Awaitable[T]], *arguments: Any) -> Future[T]:
        """Begin a call in the event loop; when the loop has ended, the future has a `ClientClosed`."""
        future: Future[T] = Future()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        self.call_soon(self._begin, future, work, arguments)
        if self._ended:
            self._end_waiting()
        return future

    def call(self, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run a call in the event loop, return what it returns or raise what it raises.

        An exception in the waiting thread, such as `KeyboardInterrupt`, leaves at once and cancels the call.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a blocking client must not be called in its own event loop thread")
        future = self.submit(work, *arguments)
        try:
            return future.result()
        finally:
            future.cancel()
            del future  # else it keeps an error, whose traceback keeps this frame, which keeps it

    def call_plain(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run a plain function in the event loop, else as `call`."""

        async def run() -> T:
            return work(*arguments)

        return self.call(run)

    def call_soon(self, work: Callable[..., object], *arguments: Any, context: Context | None = None) -> None:
        """Call a plain function in the event loop and do not wait; nothing happens when the loop has ended."""
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(work, *arguments, context=context)
        except RuntimeError:
            logger.debug("the event loop has ended before %r was called", work)

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a task that must not fail, and do not wait, not even for its beginning.

        In an empty context: what it does is not part of the request that happened to begin it.
        """
        self.call_soon(self._start, work, context=Context())

    def join_if_stopping(self) -> None:
        """Return when a stopped thread has ended."""
        if self._stopping and threading.current_thread() is not self._thread:
            self._thread.join(JOIN_SECONDS_MAX)

    # --- in the event loop ---------------------------------------------------------------------
    def stop(self) -> None:
        """Let the thread end, with whatever calls there are."""
        self._stopping = True
        self._over.set()

    def _start(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        # Of asyncio: a task group of anyio starts tasks only for those who wait, or who are tasks themselves.
        task = asyncio.create_task(work(*arguments))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _begin(self, future: Future[T], work: Callable[..., Awaitable[T]], arguments: tuple[Any, ...]) -> None:
        # A call that is cancelled before it began must not begin.
        if not self._stopping and not future.cancelled():
            self._start(self._carry, future, work, arguments)

    async def _carry(self, future: Future[T], work: Callable[..., Awaitable[T]], arguments: tuple[Any, ...]) -> None:
        with anyio.CancelScope() as scope:
            future.add_done_callback(lambda done: self.call_soon(scope.cancel) if done.cancelled() else None)
            try:
                result = await work(*arguments)
            except asyncio.CancelledError:
                _settle(future, error=ClientClosed("the client was closed before this call was done"))
                raise
            except BaseException as error:  # noqa: BLE001 raised again in the thread that asked
                _settle(future, error=error)
            else:
                _settle(future, result=result)


def _settle(future: Future[Any], *, result: object = None, error: BaseException | None = None) -> None:
    """Tell the thread that waits, if it still does."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def refuse_event_loop() -> None:
    """Raise `RuntimeError` in a thread that runs an event loop: waiting here would stop all its tasks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Looked up, not imported: nobody can run trio without having imported it.
        lowlevel = getattr(sys.modules.get("trio"), "lowlevel", None)
        if lowlevel is None or not lowlevel.in_trio_run():
            return
    raise RuntimeError(
        "kiteq_client.blocking.Client would block the event loop that runs in this thread: "
        "use kiteq_client.Client with `await`, or call this in a thread (asyncio.to_thread, sync_to_async)"
    )


def _refuse_green_threads() -> None:
    """Raise `RuntimeError` where `threading` starts no threads: the event loop would stop all of them, for ever."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if (gevent is not None and gevent.is_module_patched("threading")) or (
        eventlet is not None and eventlet.is_monkey_patched("thread")
    ):
        raise RuntimeError("kiteq_client.blocking needs real threads: it does not work with gevent or eventlet")
