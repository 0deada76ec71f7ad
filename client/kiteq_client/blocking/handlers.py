"""Which plain function handles which message."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from kiteq.message import Received
from kiteq_client import handlers as asynchronous
from kiteq_client.blocking.threads import Threads

__all__ = ["Handler", "Handlers", "InThreads", "check_plain"]

Handler = Callable[[Received], object]
_H = TypeVar("_H", bound=Handler)


def check_plain(function: object) -> None:
    """Raise `TypeError` unless `function` can be called and is not `async def`."""
    if not callable(function):
        raise TypeError(f"a handler must be a function, and {function!r} is not")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        raise TypeError(
            f"{function!r} is `async def`: kiteq_client.blocking takes plain functions, kiteq_client.Client takes those"
        )


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

    def on(self, topic: str, message_type: str | None = None) -> Callable[[_H], _H]:
        """Register the decorated function for a message type, or for all others of the topic.

        Raises `TypeError` for an `async def` function, `ValueError` for one that is registered already.
        """
        register_async = self._registry.on(topic, message_type)

        def register(function: _H) -> _H:
            check_plain(function)
            register_async(_Registered(function))
            return function

        return register

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

    def find(self, topic: str, message_type: str) -> asynchronous.Handler | None:
        """Return the handler of a message, or None."""
        function = self._find(topic, message_type)
        if function is None:
            return None

        async def handle(message: Received) -> Any:
            return await self._threads.run(function, message)

        return handle
