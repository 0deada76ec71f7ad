"""What a server in the foreground has in common, one broker or several: its log, its signals, what it says."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import structlog

from kiteq import logs
from kiteq.config import Resolved

__all__ = ["begin_log", "obey", "say", "say_stopping"]


def begin_log(resolved: Resolved) -> None:
    """Log as the settings say, and tell of variables that look like a setting but are none."""
    logs.configure(resolved.settings.log_level, resolved.settings.log_format)
    for variable, nearest in resolved.misspelt:
        structlog.get_logger().warning("unknown environment variable", variable=variable, did_you_mean=nearest)


async def obey(signals: AsyncIterator[int], stop: Callable[[], None], kill: Callable[[], None] = lambda: None) -> None:
    """Stop at the first signal; at the second one kill, and end this process at once."""
    is_stopping = False
    async for number in signals:
        if is_stopping:
            kill()
            os._exit(128 + number)
        is_stopping = True
        stop()


def say_stopping() -> None:
    """Tell whoever has sent the signal what it does."""
    say("stopping: clients may finish what they hold; a second signal ends at once")


def say(text: str) -> None:
    """Print something for whoever started this."""
    # Nobody may be reading (`kiteq | head -1`); that is no reason to stop.
    with suppress(OSError):
        print(text, flush=True)
