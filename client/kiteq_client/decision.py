"""What became of a producer's local transaction."""

from __future__ import annotations

from enum import Enum
from typing import Final

from kiteq.remoting.packets import DECISION_COMMIT, DECISION_ROLLBACK, DECISION_RUNNING, DECISION_UNKNOWN

__all__ = ["CODES", "Decision"]


class Decision(Enum):
    """The answer to "was it committed?".

    ROLLBACK is right only when a later commit is impossible; otherwise the answer is UNKNOWN.
    RUNNING: the local transaction is not over; ask again later.
    """

    COMMIT = "commit"
    ROLLBACK = "rollback"
    UNKNOWN = "unknown"
    RUNNING = "running"


CODES: Final = {
    Decision.ROLLBACK: DECISION_ROLLBACK,
    Decision.COMMIT: DECISION_COMMIT,
    Decision.UNKNOWN: DECISION_UNKNOWN,
    Decision.RUNNING: DECISION_RUNNING,
}
"""As the wire says them."""
