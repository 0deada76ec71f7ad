"""Logging: structlog on stderr, readable on a terminal, JSON otherwise.

Standard output is left to what a person asked for. An event is a short sentence; ids and names are keys
beside it (`logger.info("client connected", client=..., group=...)`); bodies and secrets are never logged.
"""

from __future__ import annotations

import logging
import sys
from typing import Final, Literal, TextIO

import structlog

__all__ = ["LEVELS", "configure"]

LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(
    level: str = "info",
    format: Literal["auto", "console", "json"] = "auto",
    stream: TextIO | None = None,
) -> None:
    """Send events of `level` and above to `stream` (standard error when left out).

    "auto" is "console" when the stream is a terminal, else "json": one object per line with the keys
    `timestamp`, `level` and `event`.
    """
    target = sys.stderr if stream is None else stream
    on_terminal = target.isatty()
    readable = format == "console" or (format == "auto" and on_terminal)
    renderers: list[structlog.typing.Processor]
    if readable:
        # Tracebacks stay plain: the rich ones print local variables, which may be bodies or secrets.
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=on_terminal, exception_formatter=plain)]
    else:
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(file=target),
        # Tests configure anew with another stream; a logger kept from before would write to the old one.
        cache_logger_on_first_use=False,
    )
