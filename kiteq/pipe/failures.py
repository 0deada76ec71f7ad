"""How long a failed message waits for its next attempt."""

from __future__ import annotations

import random
from bisect import bisect_right
from typing import Final

__all__ = ["WAITS_SECONDS", "wait_seconds"]

WAITS_SECONDS: Final = ((1, 0.0), (3, 5.0), (10, 10.0), (20, 20.0), (30, 40.0), (40, 80.0), (50, 160.0))
"""(from this failure on, seconds): KiteQ's windows."""
JITTER_SHARE: Final = 0.1
"""Up to this much longer, so that what failed together does not come back together."""

_FROM = [start for start, _ in WAITS_SECONDS]


def wait_seconds(failures: int) -> float:
    """Return how long a message waits after its nth failure, n from 1."""
    wait = WAITS_SECONDS[bisect_right(_FROM, failures) - 1][1]
    return wait * (1 + JITTER_SHARE * random.random())
