"""Which plain functions handle messages and answer checks."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from kiteq.message import Received
from kiteq_client import checking
from kiteq_client import handlers as asynchronous
from kiteq_client.blocking.threads import Threads
from kiteq_client.decision import Decision

__all__ = ["Callbacks", "CheckFunction", "Checker", "Handler", "Handlers"]

Handler = Callable[[Received], object]
CheckFunction = Callable[[Received], Decision]


@runtime_checkable
class Checker(Protocol):
    """A check function that also hears of the decisions that the broker has on disk.

    Its methods may be plain, then they run in threads, or `async def`, then they run in the event loop thread.
    """

    def check(self, message: Received) -> Decision | Awaitable[Decision]:
        """Say what became of the local transaction of this message."""
        ...

    def decided(self, transaction_id: bytes, decision: Decision) -> Awaitable[None] | None:
        """Hear that the broker has this decision, COMMIT or ROLLBACK, on disk."""
        ...


_H = TypeVar("_H", bound=Handler)
_C = TypeVar("_C", bound=CheckFunction | Checker)


def check_plain(function: object) -> None:
    """Raise `TypeError` unless `function` can be called and is not `async def`."""
    if not callable(function):
        raise TypeError(f"a handler must be a function, and {function!r} is not")
    if _is_async(function):
        raise TypeError(
            f"{function!r} is `async def`: kiteq_client.blocking takes plain functions, kiteq_client.Client takes those"
        )


def check_checker(checker: object) -> None:
    """Raise `TypeError` unless it is a plain function or an object with the methods of a `Checker`."""
    if inspect.isclass(checker) or not isinstance(checker, Checker):
        check_plain(checker)


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class _Registered:
    """A plain function in the shape in which the registry of the async client keeps handlers."""

    __slots__ = ("function",)

    def __init__(self, function: Handler) -> None:
        self.function = function

    async def __call__(self, message: Received) -> None:
        raise AssertionError("handlers of a blocking client are called through its threads")


class Handlers:
    """Plain functions by topic and message type; the most exact one gets the message.

        handlers = Handlers()


        @handlers.on("trade", "pay-succ")
        def paid(message: Received) -> None: ...

    Returning acks the message. Raising fails the attempt, and the broker tries again later; see
    `kiteq_client.RetryAfter` and `kiteq_client.Reject`.
    """

    def __init__(self) -> None:
        self._registry = asynchronous.Handlers()
        self.checker: CheckFunction | Checker | None = None
        self._is_empty = True

    @property
    def only_checks(self) -> bool:
        """Whether these are for a producer: a check function, and no handler."""
        return self.checker is not None and self._is_empty

    def on(self, topic: str, message_type: str | None = None) -> Callable[[_H], _H]:
        """Register the decorated function for a message type, or for all others of the topic.

        Raises `TypeError` for an `async def` function, `ValueError` for one that is registered already.
        """
        register_async = self._registry.on(topic, message_type)

        def register(function: _H) -> _H:
            check_plain(function)
            register_async(_Registered(function))
            self._is_empty = False
            return function

        return register

    def check(self, function: _C) -> _C:
        """Register the decorated function, or a `Checker`, as the one that is asked about transactions.

        Raises `TypeError` for an `async def` function, `ValueError` if there is one already.
        """
        if self.checker is not None:
            raise ValueError("there is a check function already")
        check_checker(function)
        self.checker = function
        return function

    def find(self, topic: str, message_type: str) -> Handler | None:
        """Return the handler of a message, or None."""
        found = self._registry.find(topic, message_type)
        return found.function if isinstance(found, _Registered) else None


class InThreads(asynchronous.Handlers):
    """What the async client is given: handlers that call plain functions in threads.

    find: the plain handler of a topic and message type.
    """

    def __init__(self, find: Callable[[str, str], Handler | None], threads: Threads) -> None:
        super().__init__()
        self._find = find
        self._threads = threads

    @property
    def only_checks(self) -> bool:
        """Whether there is no handler; the check function is not given this way."""
        return False

    def find(self, topic: str, message_type: str) -> asynchronous.Handler | None:
        """Return the handler of a message, or None."""
        function = self._find(topic, message_type)
        if function is None:
            return None

        async def handle(message: Received) -> Any:
            return await self._threads.run(function, message)

        return handle


class CheckInThreads:
    """What the async client is given as its check function: it calls a plain one in a thread."""

    def __init__(self, check: CheckFunction, threads: Threads) -> None:
        self._check = check
        self._threads = threads

    async def __call__(self, message: Received) -> Decision:
        """Ask the plain function."""
        answer: Decision = await self._threads.run(self._check, message)
        return answer


class CheckerInThreads:
    """What the async client is given as its `Checker`: plain methods are called in threads."""

    def __init__(self, checker: Checker, threads: Threads) -> None:
        self._checker = checker
        self._threads = threads

    async def check(self, message: Received) -> Decision:
        """Ask the checker."""
        answer: Decision = await self._run(self._checker.check, message)
        return answer

    async def decided(self, transaction_id: bytes, decision: Decision) -> None:
        """Tell the checker."""
        await self._run(self._checker.decided, transaction_id, decision)

    async def _run(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if _is_async(method):
            return await method(*arguments)
        return await self._threads.run(method, *arguments)


class Callbacks(NamedTuple):
    """The functions of a user that one client calls."""

    handlers: Handlers | None
    on_message: Handler | None
    on_check: CheckFunction | Checker | None

    def check(self) -> None:
        """Raise `ValueError` for two where one is possible, `TypeError` for what cannot be called."""
        if self.handlers is not None and self.on_message is not None:
            raise ValueError("give handlers or on_message, not both")
        if self.on_message is not None:
            check_plain(self.on_message)
        if self.on_check is not None:
            check_checker(self.on_check)
            if self.handlers is not None and self.handlers.checker is not None:
                raise ValueError("give on_check or a function under handlers.check, not both")

    @property
    def handle(self) -> bool:
        """Whether there is any that handles messages."""
        return self.on_message is not None or (self.handlers is not None and not self.handlers.only_checks)

    @property
    def checker(self) -> CheckFunction | Checker | None:
        """Who answers checks."""
        return self.on_check if self.handlers is None else self.on_check or self.handlers.checker

    def handlers_in(self, threads: Threads) -> asynchronous.Handlers | None:
        """Return the handlers in the form that the async client takes."""
        if not self.handle:
            return None
        on_message, handlers = self.on_message, self.handlers
        return InThreads(handlers.find if handlers is not None else lambda *_: on_message, threads)

    def checker_in(self, threads: Threads) -> checking.CheckFunction | checking.Checker | None:
        """Return who answers checks in the form that the async client takes."""
        checker = self.checker
        if checker is None:
            return None
        return CheckerInThreads(checker, threads) if isinstance(checker, Checker) else CheckInThreads(checker, threads)
