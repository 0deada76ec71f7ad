"""The application's answers about undecided transactions.

Theory of operation. Checks wait in a queue; one task starts one more task for each, a few at a time, so a
slow check function holds up neither the connection nor the others for long. Whatever goes wrong in it is
an answer too: unknown, which decides nothing.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, runtime_checkable

import anyio
from anyio.abc import TaskGroup

from kiteq.message import Received, decode
from kiteq_client.decision import Decision
from kiteq_client.signal import Signal

__all__ = ["Check", "CheckFunction", "Checker", "Checking", "check_checker"]

logger = logging.getLogger("kiteq_client")

CHECKS_AT_A_TIME_MAX: Final = 16
"""Check functions that run at once: each may hold a connection of the application's database."""
CHECKS_WAITING_MAX: Final = 10_000
"""Checks that wait for their turn; the broker asks again about those that find no room."""
DECIDED_WAITING_MAX: Final = 65_536
"""Decisions that a `Checker` was not told of yet; beyond it the oldest are not told."""

CheckFunction = Callable[[Received], Awaitable[Decision]]


@runtime_checkable
class Checker(Protocol):
    """A check function that also hears of the decisions that the broker has on disk."""

    async def check(self, message: Received) -> Decision:
        """Say what became of the local transaction of this message."""
        ...

    async def decided(self, transaction_id: bytes, decision: Decision) -> None:
        """Hear that the broker has this decision, COMMIT or ROLLBACK, on disk."""
        ...


def check_checker(checker: object) -> None:
    """Raise `TypeError` unless it is an `async def` function, or an object with the methods of a `Checker`."""
    if isinstance(checker, Checker) and not inspect.isclass(checker):
        wrong = [name for name in ("check", "decided") if not _is_async(getattr(checker, name))]
        if wrong:
            raise TypeError(f"a Checker needs `async def {wrong[0]}`, and that of {checker!r} is not")
    elif not _is_async(checker):
        raise TypeError(f"a check function must be an `async def` function, and {checker!r} is not")


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class Check:
    """One question: what became of this transaction?

    timeout: seconds for the answer. answer: called once with it, unless the client leaves before.
    """

    __slots__ = ("answer", "attempt", "blob", "id", "timeout")

    def __init__(
        self, id: bytes, blob: bytes, attempt: int, timeout: float, answer: Callable[[Decision], None]
    ) -> None:
        self.id = id
        self.blob = blob
        self.attempt = attempt
        self.timeout = timeout
        self.answer = answer


class Checking:
    """Asks the check function of a client.

    checker: of the user, None if there is none.
    """

    def __init__(self, group: str, checker: CheckFunction | Checker | None) -> None:
        self.stopping = False
        self._group = group
        self._check: Callable[[Received], Awaitable[object]] | None = None
        self._tell: Callable[[bytes, Decision], Awaitable[None]] | None = None
        if isinstance(checker, Checker):
            self._check, self._tell = checker.check, checker.decided
        elif checker is not None:
            self._check = checker
        self._waiting: deque[Check] = deque()
        self._asked: set[bytes] = set()
        self._running = 0
        self._ready = Signal()
        self._decided: deque[tuple[bytes, Decision]] = deque(maxlen=DECIDED_WAITING_MAX)
        self._to_tell = Signal()
        self._warned = False

    @property
    def has_check(self) -> bool:
        """Whether there is anybody to ask."""
        return self._check is not None

    @property
    def is_telling(self) -> bool:
        """Whether the checker is still to be told of a decision."""
        return bool(self._decided)

    def ask(self, check: Check, *, first: bool = False) -> bool:
        """Answer a check, now or when its turn comes; return False if it will not be.

        One that is asked already is not asked twice. first: before those that wait already.
        """
        if self._check is None:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the broker asks about transaction %s, and this client has no check function: such questions "
                    "are answered with unknown; give the client on_check=",
                    check.id.hex(),
                )
            check.answer(Decision.UNKNOWN)
            return True
        if check.id in self._asked or len(self._waiting) >= CHECKS_WAITING_MAX or self.stopping:
            return False
        self._asked.add(check.id)
        if first:
            self._waiting.appendleft(check)
        else:
            self._waiting.append(check)
        self._ready.set()
        return True

    def decided(self, id: bytes, decision: Decision) -> None:
        """Tell the checker that the broker has a decision on disk."""
        if self._tell is not None:
            self._decided.append((id, decision))
            self._to_tell.set()

    # --- tasks ---------------------------------------------------------------------------------
    async def run(self) -> None:
        """Ask until cancelled."""
        if self._check is None:
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell_decided)
            while True:
                await self._ready.wait()
                self._start(tasks)

    def _start(self, tasks: TaskGroup) -> None:
        while self._waiting and self._running < CHECKS_AT_A_TIME_MAX:
            self._running += 1
            tasks.start_soon(self._answer, self._waiting.popleft())

    async def _answer(self, check: Check) -> None:
        answer = Decision.UNKNOWN
        scope = anyio.CancelScope(deadline=anyio.current_time() + check.timeout)
        try:
            with scope:
                answer = await self._ask(check, scope)
            if scope.cancelled_caught:
                logger.warning(
                    "the check function did not answer within %g s: transaction %s stays unknown",
                    check.timeout, check.id.hex(),
                )  # fmt: skip
        finally:
            self._running -= 1
            self._asked.discard(check.id)
            self._ready.set()
        check.answer(answer)

    async def _ask(self, check: Check, scope: anyio.CancelScope) -> Decision:
        """Return the answer of the check function, or unknown for whatever is none."""
        assert self._check is not None
        try:
            answer = await self._check(decode(check.blob, self._group, check.attempt))
        except BaseException as error:
            if self._is_ours(error, scope):
                raise
            logger.warning(
                "the check function failed, so transaction %s stays unknown: %s: %s",
                check.id.hex(), type(error).__name__, error, exc_info=error,
            )  # fmt: skip
            return Decision.UNKNOWN
        if isinstance(answer, Decision):
            return answer
        logger.warning(
            "the check function returned %.200r, which is no Decision, so transaction %s stays unknown",
            answer, check.id.hex(),
        )  # fmt: skip
        return Decision.UNKNOWN

    async def _tell_decided(self) -> None:
        tell = self._tell
        while tell is not None:
            await self._to_tell.wait()
            while self._decided:
                key, decision = self._decided[0]
                try:
                    await tell(key, decision)
                except BaseException as error:
                    if self._is_ours(error, None):
                        raise
                    logger.warning("the checker failed to note the decision about %s", key.hex(), exc_info=error)
                # It is not the first any more if it fell out meanwhile.
                if self._decided and self._decided[0] == (key, decision):
                    self._decided.popleft()

    def _is_ours(self, error: BaseException, scope: anyio.CancelScope | None) -> bool:
        """Whether an exception is the cancellation of this task, and not of something the user started."""
        return isinstance(error, anyio.get_cancelled_exc_class()) and (
            self.stopping or (scope is not None and scope.cancel_called)
        )
