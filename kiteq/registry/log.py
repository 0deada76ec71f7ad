"""Where the registry's parts tell what happened: the broker's log or the one of a client."""

from __future__ import annotations

import logging
from typing import Protocol

__all__ = ["Log", "StandardLog"]


class Log(Protocol):
    """A logger of structlog is one."""

    def info(self, event: str, **values: object) -> object:
        """Tell what is good to know."""

    def warning(self, event: str, **values: object) -> object:
        """Tell what somebody should look at."""


class StandardLog:
    """Writes to a logger of the standard library."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def info(self, event: str, **values: object) -> None:
        """Tell what is good to know."""
        self._logger.info("%s", _line(event, values))

    def warning(self, event: str, **values: object) -> None:
        """Tell what somebody should look at."""
        self._logger.warning("%s", _line(event, values))


def _line(event: str, values: dict[str, object]) -> str:
    return " ".join([event, *(f"{name}={value!r}" for name, value in values.items())])
