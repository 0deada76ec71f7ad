"""How a command fails: one sentence on standard error, a status, no traceback."""

from __future__ import annotations

from typing import Final

from kiteq.errors import ConfigError, KiteQError

__all__ = ["STATUS_FAILED", "STATUS_USAGE", "CommandFailed", "sentence_and_status", "sole"]

STATUS_FAILED: Final = 1
STATUS_USAGE: Final = 2


class CommandFailed(KiteQError):
    """A command cannot do what was asked."""

    def __init__(self, sentence: str, status: int = STATUS_FAILED) -> None:
        super().__init__(sentence)
        self.status = status


def sole(error: BaseException) -> BaseException:
    """Return the only error of a group, of groups in groups too; any other error as it is."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def sentence_and_status(error: BaseException) -> tuple[str, int] | None:
    """Return what to say about an error and the status to end with; None when it is a defect of kiteq."""
    error = sole(error)
    if isinstance(error, CommandFailed):
        return str(error), error.status
    if isinstance(error, ConfigError):
        return str(error), STATUS_USAGE
    if isinstance(error, KiteQError):
        return str(error), STATUS_FAILED
    if isinstance(error, OSError):
        named = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        return named or str(error), STATUS_FAILED
    return None
