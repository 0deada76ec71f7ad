"""What happens when the block of a marked message is left without an exception.

Theory of operation. The message is committed only when the marker's own connection sees the committed row.
No row means that the user's transaction is open, which raises; or that it was rolled back, which a check
makes certain: its tombstone keeps a later marker out, so the message is rolled back at once. Django's
`atomic` may go on longer than the block; then its `on_commit` decides.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kiteq_client.decision import Decision
from kiteq_client.marker.dialects import Dialect, Executor, Trouble
from kiteq_client.marker.errors import MarkRefused, StillInTransaction
from kiteq_client.marker.for_django import DjangoLocal
from kiteq_client.marker.local import Local
from kiteq_client.marker.own import Runner
from kiteq_client.marker.protocol import Table

__all__ = ["Marked", "Transaction", "watch"]

logger = logging.getLogger("kiteq_client")

OPEN = "open"
"""The outcome of a transaction that nobody has decided."""


class Transaction(Protocol):
    """What the marker needs of the transaction of a message, of either client."""

    @property
    def id(self) -> bytes:
        """Its 16 bytes."""

    @property
    def outcome(self) -> str:
        """What became of it; "open" at first."""

    def on_leave(self, hook: Callable[[], Any], /) -> None:
        """Call the hook when the block is left without an exception."""

    def defer(self) -> None:
        """Let leaving decide nothing."""

    def abandon(self) -> None:
        """Decide nothing; the checks do."""

    def commit(self) -> Any:
        """Commit what was deferred."""

    def rollback(self) -> Any:
        """Roll back."""


@dataclass(slots=True)
class Marked:
    """One call of `mark`: the message's transaction and the user's.

    error: why the call failed, None if it did not.
    """

    tx: Transaction
    local: Local
    error: Exception | None = None


def watch(marked: Marked, runner: Runner, table: str) -> None:
    """Look at the table when the block of this message is left."""
    is_async = inspect.iscoroutinefunction(marked.tx.rollback)
    hook = _AsyncHook(marked, runner, table) if is_async else _Hook(marked, runner, table)
    marked.tx.on_leave(hook.leave)


class _Hook:
    """For the blocking client."""

    def __init__(self, marked: Marked, runner: Runner, table: str) -> None:
        self.marked = marked
        self.runner = runner
        self.table = table

    def leave(self) -> Any:
        """Look, and roll back or raise; returning lets the message be committed."""
        if not self.is_settled():
            look = self.look()
            try:
                decision = self.runner.run(look)
            except Exception as error:  # noqa: BLE001 whatever the driver raises, nothing is known
                self.failed(look, error)
            else:
                if self.must_roll_back(decision):
                    self.marked.tx.rollback()

    def is_settled(self) -> bool:
        """Whether there is nothing to look at: it is decided, or Django decides."""
        tx, local = self.marked.tx, self.marked.local
        if tx.outcome != OPEN:
            return True
        if self.marked.error is None and isinstance(local, DjangoLocal) and local.is_open():
            if inspect.iscoroutinefunction(tx.commit):
                raise MarkRefused("inside an open atomic block the decision is Django's: use kiteq_client.blocking")
            tx.defer()
            local.on_commit(_OnCommit(tx))
            return True
        return False

    def look(self) -> _Look:
        """Return the piece of work for our own connection."""
        return _Look(self.table, self.marked.tx.id.hex(), self.marked.local.is_open())

    def must_roll_back(self, decision: Decision) -> bool:
        """Return whether to roll back. Raises what the user has to know."""
        marked = self.marked
        if decision is Decision.COMMIT:
            return False
        if marked.error is not None:
            # It was caught, so the user's rows may be committed without a marker: never silently.
            raise marked.error
        if decision is Decision.RUNNING:
            raise StillInTransaction(
                "the database transaction was not over when the block of the message was left: the message stays "
                "undecided until the broker asks; commit or roll back inside the block"
            )
        if decision is Decision.UNKNOWN:
            self.undecided("its row is locked, or was deleted just now")
        return decision is Decision.ROLLBACK

    def failed(self, look: _Look, error: Exception) -> None:
        """Our own connection failed. Raises what the user has to know."""
        if self.marked.error is not None:
            raise self.marked.error
        if look.is_open is None and look.trouble is Trouble.LOCKED:
            self.must_roll_back(Decision.RUNNING)
        self.undecided(f"the marker's own connection failed: {type(error).__name__}: {error}")

    def undecided(self, why: str) -> None:
        """Leave it to the checks. No error: the user's transaction has ended as the user ended it."""
        self.marked.tx.abandon()
        logger.warning(
            "message %s is undecided until the broker asks, because %s; your local transaction stands",
            self.marked.tx.id.hex(), why,
        )  # fmt: skip


class _AsyncHook(_Hook):
    """For the async client."""

    async def leave(self) -> None:
        """Do the same without holding up the event loop."""
        if not self.is_settled():
            look = self.look()
            try:
                decision = await self.runner.arun(look)
            except Exception as error:  # noqa: BLE001 whatever the driver raises, nothing is known
                self.failed(look, error)
            else:
                if self.must_roll_back(decision):
                    await self.marked.tx.rollback()


class _Look:
    """Find out, on our own connection, how the user's transaction ended.

    is_open: whether the user's connection is in a transaction; None if it cannot tell.
    trouble: what the error means, if one was raised.
    """

    def __init__(self, table: str, id: str, is_open: bool | None) -> None:
        self.is_open = is_open
        self.trouble = Trouble.OTHER
        self._table = table
        self._id = id

    def __call__(self, executor: Executor, dialect: Dialect) -> Decision:
        """Return COMMIT or ROLLBACK; RUNNING if it goes on. Raises what the driver raises."""
        table = Table(dialect, self._table)
        try:
            # The row decides, not the connection: a pool may have lent that to somebody else meanwhile.
            if table.is_marked(executor, self._id):
                return Decision.COMMIT
            if self.is_open:
                return Decision.RUNNING
            decision = table.decide(executor, self._id)
            # The row is locked, and not by the user's connection: by a check, or by nobody knows whom.
            return Decision.UNKNOWN if decision is Decision.RUNNING and self.is_open is False else decision
        except Exception as error:
            self.trouble = dialect.trouble(error)
            raise


class _OnCommit:
    """Decides when Django's outermost atomic block has ended.

    Django calls it after a commit, and drops it, uncalled, at a rollback; only `__del__` sees that.
    """

    def __init__(self, tx: Transaction) -> None:
        self._tx = tx
        self._called = False

    def __call__(self) -> None:
        self._called = True
        try:
            self._tx.commit()
        except Exception:
            # The request has done its work: the checks find the marker.
            logger.warning("the commit of message %s failed; the broker will ask", self._tx.id.hex(), exc_info=True)
            self._tx.abandon()

    def __del__(self) -> None:
        if not self._called:
            self._tx.abandon()
