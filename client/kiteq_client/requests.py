"""Requests of one connection that somebody waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from kiteq.errors import SendTimeout

__all__ = ["Requests"]


class _Request:
    """One of them, and its answer."""

    __slots__ = ("answered", "error", "result")

    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.result: Any = None
        self.error: Exception | None = None


class Requests:
    """The requests that were sent and not answered."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._open: dict[int, _Request] = {}

    @property
    def is_open(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._open)

    async def ask(self, number: int, send: Callable[[], None], broker: str) -> Any:
        """Send a request and return its result. Raises its refusal, `SendTimeout` or what ended the connection."""
        self._open[number] = request = _Request()
        send()
        try:
            with anyio.fail_after(self._timeout):
                await request.answered.wait()
        except TimeoutError:
            raise SendTimeout(f"{broker} did not answer within {self._timeout:g} s") from None
        finally:
            self._open.pop(number, None)
        if request.error is not None:
            raise request.error
        return request.result

    def answer(self, number: int, result: Any) -> None:
        """Hand over a result, if somebody still waits for it."""
        if (request := self._open.pop(number, None)) is not None:
            request.result = result
            request.answered.set()

    def refuse(self, number: int, error: Exception) -> bool:
        """Fail a request; return False if there is no such request."""
        request = self._open.pop(number, None)
        if request is None:
            return False
        request.error = error
        request.answered.set()
        return True

    def refuse_all(self, error: Exception) -> None:
        """Fail every request."""
        for number in list(self._open):
            self.refuse(number, error)
