"""What the marker asks of the connection or session that a user passes."""

from __future__ import annotations

from typing import Protocol

from kiteq_client.marker.dialects import Dialect, Executor

__all__ = ["Local"]


class Local(Protocol):
    """A user's connection of one library, in the transaction that is to be marked."""

    @property
    def executor(self) -> Executor:
        """Runs statements in that transaction."""

    @property
    def dialect(self) -> Dialect:
        """That of its database."""

    def refuse(self) -> None:
        """Raise `MarkRefused` in autocommit or inside a savepoint, as far as the connection shows it."""

    def rollback(self) -> None:
        """Roll the whole transaction back."""

    def is_open(self) -> bool | None:
        """Whether the transaction goes on; None if the connection cannot tell. Never asks the database."""
