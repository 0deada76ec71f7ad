"""What became of a producer's local transaction."""

from __future__ import annotations

from enum import Enum

__all__ = ["Decision"]


class Decision(Enum):
    """The answer to "was it committed?"; asked by brokers with transactions, which this version has not.

    ROLLBACK is right only when a later commit is impossible; otherwise the answer is UNKNOWN.
    """

    COMMIT = "commit"
    ROLLBACK = "rollback"
    UNKNOWN = "unknown"
    RUNNING = "running"
