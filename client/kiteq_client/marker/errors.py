"""What the marker raises.

KiteQError
 +-- MarkerError
      +-- AlreadyRolledBack      the message is rolled back, so this transaction was too
      +-- MarkRefused            the connection has no transaction that a marker can belong to
      +-- StillInTransaction     the block was left before the database transaction ended
"""

from __future__ import annotations

from kiteq.errors import KiteQError

__all__ = ["AlreadyRolledBack", "MarkRefused", "MarkerError", "StillInTransaction"]


class MarkerError(KiteQError):
    """The root of the marker's errors."""


class AlreadyRolledBack(MarkerError):
    """The table has a row for this message already; your database transaction is rolled back.

    Nobody's fault: the work took so long that the broker asked about it, and the message was rolled back; or
    `mark` was called a second time after a commit. Do not go on with this transaction: begin anew, with a
    new message.
    """


class MarkRefused(MarkerError):
    """Your code called `mark` where a marker proves nothing: in autocommit, or inside a savepoint."""


class StillInTransaction(MarkerError):
    """Your code left the block of the message while its database transaction was open.

    The message stays undecided; the broker asks later, and the marker answers by what became of the row.
    Commit or roll back inside the block.
    """
