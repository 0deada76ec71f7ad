"""From seconds and dates, as a user gives them, to the milliseconds that a message carries."""

from __future__ import annotations

import time
from datetime import datetime
from math import ceil, isfinite
from typing import Final

from kiteq.limits import DELAY_MS_MAX, TTL_MS_MAX

__all__ = ["delay_milliseconds", "deliver_at_milliseconds", "epoch_seconds", "ttl_milliseconds"]

_NONE: Final = -1
"""For what is infinite, or no number."""


def ttl_milliseconds(ttl: float | None) -> int:
    """Return a time to live in seconds, None for the longest, as milliseconds. Raises `ValueError`."""
    if ttl is None:
        return TTL_MS_MAX
    ttl_ms = round(ttl * 1000) if _is_number(ttl) else _NONE
    if not 1 <= ttl_ms <= TTL_MS_MAX:
        raise ValueError(f"ttl must be above 0 and at most {TTL_MS_MAX // 1000} seconds, not {ttl}")
    return ttl_ms


def delay_milliseconds(delay: float) -> int:
    """Return a delay in seconds as milliseconds, rounded up. Raises `ValueError`."""
    delay_ms = _rounded_up(delay)
    if not 0 <= delay_ms <= DELAY_MS_MAX:
        raise ValueError(f"delay must be 0 to {DELAY_MS_MAX // 1000} seconds, not {delay}")
    return delay_ms


def deliver_at_milliseconds(deliver_at: float) -> int:
    """Return seconds since 1970 as milliseconds, rounded up. Raises `ValueError`, also for more than a year ahead."""
    deliver_at_ms = _rounded_up(deliver_at)
    if deliver_at_ms < 0:
        raise ValueError(f"deliver_at must be seconds since 1970 or a datetime, not {deliver_at!r}")
    if deliver_at_ms > time.time_ns() // 1_000_000 + DELAY_MS_MAX:
        days = DELAY_MS_MAX // 86_400_000
        raise ValueError(f"deliver_at must be at most {days} days ahead, in seconds since 1970, not {deliver_at}")
    return deliver_at_ms


def epoch_seconds(moment: datetime) -> float:
    """Return a moment as seconds since 1970. Raises `ValueError` when it has no time zone."""
    if moment.utcoffset() is None:
        raise ValueError(f"deliver_at needs a time zone: {moment.isoformat()} is another moment in each")
    return moment.timestamp()


def _rounded_up(seconds: float) -> int:
    """Return seconds as milliseconds, so that nothing is early; but 0.007 s, which times 1000 is a bit more, are 7."""
    return ceil(round(seconds * 1000, 3)) if _is_number(seconds) else _NONE


def _is_number(seconds: object) -> bool:
    return type(seconds) in (int, float) and isfinite(seconds)  # type: ignore[arg-type]
