"""Percentiles of measured values."""

from __future__ import annotations

import math
from collections.abc import Iterable


def percentiles(values: Iterable[float], scale: float = 1.0) -> dict[str, float]:
    """Return p50, p99 and the largest; nothing when there are no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    last = len(ordered) - 1
    at = {"p50": math.ceil(last * 0.50), "p99": math.ceil(last * 0.99), "max": last}
    return {name: ordered[index] * scale for name, index in at.items()}
