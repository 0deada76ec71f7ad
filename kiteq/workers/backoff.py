"""How long a worker that has ended waits for its next start."""

from __future__ import annotations

from typing import Final

__all__ = ["Backoff"]

FIRST_SECONDS: Final = 0.5
SECONDS_MAX: Final = 10.0
"""Clients go on at the other workers meanwhile, and a lasting cause is told that often."""
WELL_SECONDS: Final = 30.0
"""A worker that lived this long was well: its end is a new story."""


class Backoff:
    """At once the first time, then after waits that double."""

    def __init__(self) -> None:
        self._ends = 0

    def wait_after(self, lived_seconds: float) -> float:
        """Return how long to wait before a start, given how long the worker has lived."""
        if lived_seconds >= WELL_SECONDS:
            self._ends = 0
        self._ends += 1
        return 0.0 if self._ends == 1 else float(min(SECONDS_MAX, FIRST_SECONDS * 2 ** min(self._ends - 2, 10)))
