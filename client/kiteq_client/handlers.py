"""Which coroutine function handles which message."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar

from kiteq.message import Received, check_name
from kiteq_client.checking import Checker, CheckFunction, check_checker

__all__ = ["Handler", "Handlers", "Reject", "RetryAfter", "check_handler"]

Handler = Callable[[Received], Awaitable[object]]
_H = TypeVar("_H", bound=Handler)
_C = TypeVar("_C", bound=CheckFunction | Checker)


class RetryAfter(Exception):
    """Raised by a handler: this attempt failed, try again after this many seconds."""

    def __init__(self, seconds: float, reason: str = "") -> None:
        if not 0 <= seconds <= 7 * 24 * 3600:
            raise ValueError(f"RetryAfter takes 0 seconds to 7 days, not {seconds}")
        super().__init__(reason or f"RetryAfter: {seconds} s")
        self.seconds = seconds


class Reject(Exception):
    """Raised by a handler: this message can never be handled; it becomes a dead letter at once."""

    def __init__(self, reason: str = "rejected") -> None:
        super().__init__(reason)
        self.reason = reason


def check_handler(handler: object) -> None:
    """Raise `TypeError` unless calling `handler` returns a coroutine."""
    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None)):  # noqa: B004
        return
    raise TypeError(f"a handler must be an `async def` function, and {handler!r} is not")


class Handlers:
    """Handlers by topic and message type; the most exact one gets the message.

        handlers = Handlers()


        @handlers.on("trade", "pay-succ")
        async def paid(message: Received) -> None: ...

    Returning acks the message. Raising fails the attempt, and the broker tries again later; see
    `RetryAfter` and `Reject`.
    """

    def __init__(self) -> None:
        self._exact: dict[tuple[str, str], Handler] = {}
        self._topics: dict[str, Handler] = {}
        self.checker: CheckFunction | Checker | None = None

    @property
    def only_checks(self) -> bool:
        """Whether these are for a producer: a check function, and no handler."""
        return self.checker is not None and not self._exact and not self._topics

    def on(self, topic: str, message_type: str | None = None) -> Callable[[_H], _H]:
        """Register the decorated function for a message type, or for all others of the topic."""
        check_name("topic", topic)
        if message_type is not None:
            check_name("message type", message_type)

        def register(handler: _H) -> _H:
            check_handler(handler)
            if message_type is None:
                if topic in self._topics:
                    raise ValueError(f"topic {topic!r} has a handler already")
                self._topics[topic] = handler
            else:
                if (topic, message_type) in self._exact:
                    raise ValueError(f"{topic}/{message_type} has a handler already")
                self._exact[topic, message_type] = handler
            return handler

        return register

    def check(self, function: _C) -> _C:
        """Register the decorated function, or a `Checker`, as the one that is asked about transactions."""
        if self.checker is not None:
            raise ValueError("there is a check function already")
        check_checker(function)
        self.checker = function
        return function

    def find(self, topic: str, message_type: str) -> Handler | None:
        """Return the handler of a message, or None."""
        return self._exact.get((topic, message_type)) or self._topics.get(topic)
