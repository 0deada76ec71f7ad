"""Time that never jumps: wall-clock milliseconds anchored to the monotonic clock at start."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    """What broker and store ask for the time."""

    def monotonic(self) -> float:
        """Return seconds for deadlines; never goes back."""

    def epoch_ms(self) -> int:
        """Return milliseconds since 1970 for stored times; does not follow jumps of the wall clock."""


class SystemClock:
    """The clock of the machine, read once for its offset."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.monotonic()

    def monotonic(self) -> float:
        """Return seconds for deadlines."""
        return time.monotonic()

    def epoch_ms(self) -> int:
        """Return milliseconds since 1970."""
        return int((time.monotonic() + self._offset_s) * 1000)
