"""One transaction, as users write it: half messages around a database transaction of their own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from types import TracebackType
from typing import Self

import anyio

from kiteq.errors import ClientClosed, DecisionPending, KiteQError, TransactionConflict
from kiteq.limits import CHECK_AFTER_SECONDS_MAX, CHECK_AFTER_SECONDS_MIN
from kiteq.message import Message
from kiteq_client.deciding import Verdict
from kiteq_client.decision import Decision
from kiteq_client.half import Half
from kiteq_client.options import check_are_messages
from kiteq_client.transactions import Transactions

__all__ = ["Outcome", "Transaction", "check_messages", "explained", "pending", "to_milliseconds"]

logger = logging.getLogger("kiteq_client")

Hook = Callable[[], Awaitable[object] | object]


class Outcome(StrEnum):
    """What became of a transaction.

    PENDING: decided, but the broker has not answered yet; the client goes on sending the decision.
    UNKNOWN: not decided here; the checks decide.
    """

    OPEN = "open"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    PENDING = "pending"
    UNKNOWN = "unknown"


class Transaction:
    """Half messages that are delivered when the block is left, and not before; made by `client.transaction`.

    Put it around your database transaction, which must be over when the block is left:

        async with client.transaction(Message("trade", "pay-succ", "order 17")) as tx:
            async with database.begin() as connection:
                ...

    Leaving commits. An exception decides nothing: it passes through, and the check function is asked.
    """

    __slots__ = (
        "_confirm", "_deferred", "_half", "_hooks", "_messages", "_outcome", "_check_after_ms", "_transactions",
        "_verdict", "id",
    )  # fmt: skip

    def __init__(
        self, transactions: Transactions, messages: Sequence[Message], check_after_ms: int, *, confirm: bool
    ) -> None:
        self._half: Half | None = None
        self.id = messages[0].id
        self._transactions = transactions
        self._messages = messages
        self._check_after_ms = check_after_ms
        self._confirm = confirm
        self._outcome = Outcome.OPEN
        self._verdict: Verdict | None = None
        self._hooks: list[Hook] = []
        self._deferred = False

    @property
    def outcome(self) -> Outcome:
        """What became of it so far; PENDING changes by itself when the broker answers."""
        if self._outcome is Outcome.PENDING and self._verdict is not None and self._verdict.answered:
            self._outcome = _outcome(self._verdict)
        return self._outcome

    def __del__(self) -> None:
        # Forgotten without being left, or deferred and never decided: the checks must not hear "running" for ever.
        if self._half is not None and self._outcome is Outcome.OPEN:
            self._transactions.let_go(self._half)

    def __repr__(self) -> str:
        return f"Transaction({self.id.hex()}, {self.outcome})"

    # --- the block -----------------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        if self._messages is _ENTERED:
            raise RuntimeError("a transaction is entered once; make a new one, with a new Message")
        messages, self._messages = self._messages, _ENTERED
        try:
            self._half = await self._transactions.begin(messages, self._check_after_ms)
        except BaseException:
            self._outcome = Outcome.ROLLED_BACK
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            if self._outcome is Outcome.OPEN:
                await self._left_by(error)
            return
        if self._hooks and self._outcome is Outcome.OPEN:
            await self._run_hooks()
        if self._outcome is Outcome.OPEN and not self._deferred:
            await self._decide(Decision.COMMIT)

    async def _run_hooks(self) -> None:
        try:
            for hook in self._hooks:
                if self._outcome is not Outcome.OPEN:
                    break
                result = hook()
                if inspect.isawaitable(result):
                    await result
        except BaseException:
            self.abandon()
            raise

    async def _left_by(self, error: BaseException) -> None:
        """Leave it to the checks, and ask the first one at once if the local transaction is over."""
        self._outcome = Outcome.UNKNOWN
        half, transactions = self._opened(), self._transactions
        decision = Decision.UNKNOWN
        try:
            if isinstance(error, Exception) and transactions.checking.has_check and not self._deferred:
                # The exception must leave as itself, so a cancellation waits, no longer than two timeouts.
                with anyio.CancelScope(shield=True):
                    decision = await transactions.ask_now(half)
                    if decision in (Decision.COMMIT, Decision.ROLLBACK):
                        await self._decide_silently(half, decision)
        finally:
            if self._outcome is Outcome.UNKNOWN:
                transactions.let_go(half)

    async def _decide_silently(self, half: Half, decision: Decision) -> None:
        self._verdict = Verdict(half.token, decision, half.name)
        self._outcome = Outcome.PENDING
        await self._transactions.decide(half.place, self._verdict)
        if self._verdict.error is not None:
            logger.error("the check function said %s about %s: %s", decision.value, self.id.hex(), self._verdict.error)

    # --- inside the block ----------------------------------------------------------------------
    async def add(self, message: Message) -> None:
        """Add a message; it is durable, and shares the fate of the others, when this returns.

        Raises what `send` raises (after `SendTimeout` it may be added again, or all rolled back), and
        `RuntimeError` when the transaction is not open.
        """
        check_messages((message,))
        half = self._opened()
        if self._outcome is not Outcome.OPEN:
            raise RuntimeError(f"the transaction is {self.outcome}: nothing can be added")
        await self._transactions.enlist(half, message)

    async def rollback(self) -> None:
        """Decide that nothing is delivered; leaving the block then does nothing.

        Raises `TransactionConflict` if it was committed, by a check or an administrator; `UnknownTransaction`;
        `RuntimeError` after a commit. Without an answer in time the outcome is PENDING, as after a commit.
        """
        self._opened()
        await self._decide_once(Decision.ROLLBACK)

    def on_leave(self, hook: Hook) -> None:
        """Call `hook()`, plain or async, when the block is left without an exception and is not rolled back.

        It runs before the decision is sent. If it raises, nothing is decided, and its error leaves the block.
        """
        self._hooks.append(hook)

    # --- later than the block ------------------------------------------------------------------
    def defer(self) -> None:
        """Let leaving decide nothing: `commit`, `rollback` or `abandon` is called later, and until then it runs."""
        self._opened()
        if self._outcome is not Outcome.OPEN:
            raise RuntimeError(f"the transaction is {self.outcome}: it cannot be deferred")
        self._deferred = True

    async def commit(self) -> None:
        """Commit what was deferred. Raises as leaving the block does, and `RuntimeError` without `defer`."""
        self._opened()
        if not self._deferred:
            raise RuntimeError("leaving the block commits; commit() is for a transaction after defer()")
        await self._decide_once(Decision.COMMIT)

    def abandon(self) -> None:
        """Decide nothing: the checks do. Without effect on what is decided."""
        if self._outcome is Outcome.OPEN:
            self._outcome = Outcome.UNKNOWN
            self._transactions.let_go(self._opened())

    def _opened(self) -> Half:
        if self._half is None:
            raise RuntimeError("the transaction's block was not entered")
        return self._half

    async def _decide_once(self, decision: Decision) -> None:
        """Decide, or say what the same decision brought before."""
        if self.outcome in (Outcome.OPEN, Outcome.UNKNOWN):
            await self._decide(decision)
        elif self._verdict is None or self._verdict.decision is not decision:
            raise RuntimeError(f"the transaction is {self.outcome} already")
        elif self._verdict.error is not None:
            raise explained(self._verdict)

    async def _decide(self, decision: Decision) -> None:
        half = self._opened()
        try:
            self._transactions.check()
        except ClientClosed as error:
            self.abandon()
            raise ClientClosed(
                f"the client was left before the {decision.value} of transaction {self.id.hex()} was sent: "
                "your local transaction stands as it is, and the broker will ask about it"
            ) from error
        except Exception:
            self.abandon()
            raise
        # Now, because being cancelled while waiting changes nothing about the decision.
        self._verdict = verdict = Verdict(half.token, decision, half.name)
        self._outcome = Outcome.PENDING
        await self._transactions.decide(half.place, verdict)
        if verdict.answered:
            self._outcome = _outcome(verdict)
            if verdict.error is not None:
                raise explained(verdict)
        elif self._confirm:
            raise pending(verdict, self._transactions.timeout)
        else:
            logger.warning("%s", pending(verdict, self._transactions.timeout))


_ENTERED: Sequence[Message] = ()


def _outcome(verdict: Verdict) -> Outcome:
    """Return what an answered decision made of its transaction."""
    committed = verdict.decision is Decision.COMMIT
    if isinstance(verdict.error, TransactionConflict):
        committed = not committed
    elif verdict.error is not None:
        return Outcome.UNKNOWN
    return Outcome.COMMITTED if committed else Outcome.ROLLED_BACK


def pending(verdict: Verdict, timeout: float) -> DecisionPending:
    """Return the error for a decision that was not answered in time."""
    stands = "your local transaction stands" if verdict.decision is Decision.COMMIT else "nothing is delivered"
    return DecisionPending(
        f"no answer to the {verdict.decision.value} of transaction {verdict.id.hex()} within {timeout:g} s: "
        f"{stands}, and the client goes on sending the decision"
    )


def explained(verdict: Verdict) -> KiteQError:
    """Return the refusal of a decision, with what it means to the caller."""
    error = verdict.error
    assert error is not None
    if isinstance(error, TransactionConflict):
        what = (
            "the message was rolled back before and will not be delivered; your local transaction stands"
            if verdict.decision is Decision.COMMIT
            else "the message was committed before and will be delivered"
        )
        return TransactionConflict(error.code, f"transaction {verdict.id.hex()}: {what} ({error.reason})")
    return error


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `ValueError` for messages that cannot be in a transaction together, or that cannot be sent."""
    if not messages:
        raise ValueError("a transaction needs a message")
    check_are_messages(messages)
    if len(messages) > 1 and len({message.id for message in messages}) < len(messages):
        raise ValueError("the messages of a transaction must have different ids")
    for message in messages:
        if message.fly:
            raise ValueError("a fly message is never stored, so it cannot be in a transaction")
        message.encoded()


def to_milliseconds(check_after: float | None) -> int:
    """Return `check_after` as the wire has it. Raises `ValueError` for one out of range."""
    if check_after is None:
        return 0
    if not CHECK_AFTER_SECONDS_MIN <= check_after <= CHECK_AFTER_SECONDS_MAX:
        raise ValueError(
            f"check_after must be {CHECK_AFTER_SECONDS_MIN:g} to {CHECK_AFTER_SECONDS_MAX:g} seconds, not {check_after}"
        )
    return round(check_after * 1000)
