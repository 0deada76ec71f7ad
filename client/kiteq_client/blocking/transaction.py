"""A transaction as users of threads write it.

Theory of operation. The transaction of the async client is entered and left in the event loop, so to the
broker's questions the block is open from the one to the other. The block itself and its hooks run in the
caller's thread. What may be called while garbage is collected, `abandon`, never waits for the event loop.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from kiteq.errors import ClientClosed
from kiteq.message import Message
from kiteq_client import client as asynchronous
from kiteq_client.blocking.portal import Portal, refuse_event_loop
from kiteq_client.transaction import Outcome, check_messages, to_milliseconds
from kiteq_client.transaction import Transaction as AsyncTransaction

__all__ = ["Transaction"]

Hook = Callable[[], object]


class Transaction:
    """Half messages that are delivered when the block is left, and not before; made by `client.transaction`.

    Put it around your database transaction, which must be over when the block is left:

        with client.transaction(Message("trade", "pay-succ", "order 17")) as tx:
            with database.begin() as connection:
                ...

    Leaving commits. An exception decides nothing: it passes through, and the check function is asked.
    After a fork only the process that entered the block decides; the methods raise `RuntimeError` in others.
    """

    __slots__ = (
        "_abandoned", "_check_after", "_confirm", "_dropped", "_hooks", "_messages", "_open", "_pid",
        "_portal", "_transaction", "id",
    )  # fmt: skip

    def __init__(
        self,
        open_client: Callable[[], tuple[Portal, asynchronous.Client]],
        messages: tuple[Message, ...],
        check_after: float | None,
        *,
        confirm: bool,
    ) -> None:
        check_messages(messages)
        to_milliseconds(check_after)
        self.id = messages[0].id
        self._open = open_client
        self._messages = messages
        self._check_after = check_after
        self._confirm = confirm
        self._hooks: list[Hook] = []
        self._portal: Portal | None = None
        self._transaction: AsyncTransaction | None = None
        self._pid = 0
        self._dropped = False
        self._abandoned = False

    @property
    def outcome(self) -> Outcome:
        """What became of it so far; PENDING changes by itself when the broker answers."""
        outcome = Outcome.OPEN if self._transaction is None else self._transaction.outcome
        return Outcome.UNKNOWN if outcome is Outcome.OPEN and self._abandoned else outcome

    def __repr__(self) -> str:
        return f"Transaction({self.id.hex()}, {self.outcome})"

    # --- the block -----------------------------------------------------------------------------
    def __enter__(self) -> Self:
        if self._portal is not None:
            raise RuntimeError("a transaction is entered once; make a new one, with a new Message")
        portal, client = self._open()
        self._portal, self._pid = portal, os.getpid()
        try:
            portal.call(self._begin, client)
        except BaseException:
            portal.call_soon(self._drop)
            raise
        return self

    async def _begin(self, client: asynchronous.Client) -> None:
        transaction = client.transaction(*self._messages, confirm=self._confirm, check_after=self._check_after)
        await transaction.__aenter__()
        self._transaction = transaction
        if self._dropped:
            transaction.abandon()

    def _drop(self) -> None:
        """Interrupted between the beginning and the block: nobody will leave it."""
        self._dropped = True
        if self._transaction is not None:
            self._transaction.abandon()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        portal, transaction = self._entered(check_process=error is None)
        if self._pid != os.getpid():
            return  # an exception in a forked process is not about the parent's transaction
        try:
            if error is None:
                self._run_hooks()
                if not self._abandoned:
                    self._call(transaction.__aexit__, None, None, None)
            else:
                self._leave_by(portal, transaction, error)
        except BaseException:
            self.abandon()
            raise

    def _leave_by(self, portal: Portal, transaction: AsyncTransaction, error: BaseException) -> None:
        try:
            portal.call(transaction.__aexit__, type(error), error, error.__traceback__)
        except ClientClosed:
            # The exception of the block says more, and passes through.
            self.abandon()

    def _run_hooks(self) -> None:
        for hook in self._hooks if self.outcome is Outcome.OPEN else ():
            result = hook()
            if inspect.iscoroutine(result):
                result.close()
                raise TypeError(f"{hook!r} returned a coroutine: the hooks of a blocking client are plain functions")

    # --- inside the block ----------------------------------------------------------------------
    def add(self, message: Message) -> None:
        """Add a message; it is durable, and shares the fate of the others, when this returns.

        Raises what `send` raises (after `SendTimeout` it may be added again, or all rolled back), and
        `RuntimeError` when the transaction is not open.
        """
        self._call(self._entered()[1].add, message)

    def rollback(self) -> None:
        """Decide that nothing is delivered; leaving the block then does nothing.

        Raises `TransactionConflict` if it was committed, by a check or an administrator; `UnknownTransaction`;
        `RuntimeError` after a commit. Without an answer in time the outcome is PENDING, as after a commit.
        """
        self._call(self._entered()[1].rollback)

    def on_leave(self, hook: Hook) -> None:
        """Call `hook()` when the block is left without an exception and is not rolled back.

        It runs in the thread that leaves, before the decision is sent. If it raises, nothing is decided, and
        its error leaves the block.
        """
        self._hooks.append(hook)

    # --- later than the block ------------------------------------------------------------------
    def defer(self) -> None:
        """Let leaving decide nothing: `commit`, `rollback` or `abandon` is called later, and until then it runs."""
        portal, transaction = self._entered()
        portal.call_plain(transaction.defer)

    def commit(self) -> None:
        """Commit what was deferred. Raises as leaving the block does, and `RuntimeError` without `defer`."""
        self._call(self._entered()[1].commit)

    def abandon(self) -> None:
        """Decide nothing: the checks do. Without effect on what is decided."""
        if self._portal is not None and self._transaction is not None and self._pid == os.getpid():
            self._abandoned = True
            self._portal.call_soon(self._transaction.abandon)

    def _entered(self, *, check_process: bool = True) -> tuple[Portal, AsyncTransaction]:
        if self._portal is None or self._transaction is None:
            raise RuntimeError("the transaction's block was not entered")
        if check_process and self._pid != os.getpid():
            raise RuntimeError(f"this transaction was begun by process {self._pid}, and only that decides it")
        return self._portal, self._transaction

    def _call(self, work: Callable[..., Any], *arguments: Any) -> None:
        refuse_event_loop()
        assert self._portal is not None
        try:
            self._portal.call(work, *arguments)
        except ClientClosed as error:
            if self.outcome is not Outcome.OPEN:
                raise
            self.abandon()
            raise ClientClosed(
                f"the client was closed before transaction {self.id.hex()} was decided: your local transaction "
                "stands as it is, and the broker will ask about it"
            ) from error
