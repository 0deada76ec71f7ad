"""A flag one task waits for: set any number of times, it wakes that task once."""

from __future__ import annotations

import anyio

__all__ = ["Signal"]


class Signal:
    """Unlike an event it is cleared by waking up, and costs nothing while nobody waits."""

    __slots__ = ("_event", "is_set")

    def __init__(self) -> None:
        self._event: anyio.Event | None = None
        self.is_set = False

    def set(self) -> None:
        """Wake the waiting task, or let the next wait return at once."""
        if not self.is_set:
            self.is_set = True
            if self._event is not None:
                self._event.set()

    async def wait(self) -> None:
        """Return when set; only one task may wait."""
        if not self.is_set:
            self._event = anyio.Event()
            try:
                await self._event.wait()
            finally:
                self._event = None
        self.is_set = False
