"""The sending half of a client: calls that wait for their receipts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import monotonic

import anyio

from kiteq.errors import ClientClosed, SendTimeout
from kiteq.message import Message
from kiteq_client.outgoing import Outgoing, Result, Submission

__all__ = ["Producer"]


class Producer:
    """Keeps the calls of `send` and `send_many` that are not finished.

    ready, topics: as `Outgoing` has them. watched: called with each call, so that somebody looks at its deadline.
    """

    def __init__(
        self,
        max_in_flight: int,
        timeout: float,
        *,
        ready: Callable[[], None],
        watched: Callable[[], None],
        topics: Callable[[set[str]], None] | None = None,
    ) -> None:
        self.outgoing = Outgoing(max_in_flight, ready, topics)
        self._timeout = timeout
        self._watched = watched
        self._live: dict[Submission, None] = {}
        self._has_cancelled = False

    @property
    def is_waiting(self) -> bool:
        """Whether any call waits for answers."""
        return bool(self._live)

    async def submit(self, messages: Sequence[Message]) -> list[Result]:
        """Send messages in order; return a receipt or an error for each."""
        done = anyio.Event()
        submission = Submission(messages, monotonic() + self._timeout, done.set)
        self._live[submission] = None
        self._watched()
        self.outgoing.submit(submission)
        try:
            await done.wait()
        finally:
            del self._live[submission]
            if not submission.closed:
                submission.closed = self._has_cancelled = True
                self.outgoing.withdraw(submission)
        return submission.results  # type: ignore[return-value]

    def end_late(self, now: float, unserved: Callable[[Iterable[str]], Exception | None]) -> bool:
        """End calls whose time is over; return whether any has ended without its answers, also by being cancelled."""
        late = [submission for submission in self._live if submission.deadline <= now]
        has_cancelled, self._has_cancelled = self._has_cancelled, False
        if not late:
            return has_cancelled
        waited = f"no answer within {self._timeout:g} s"
        sent = SendTimeout(
            f"{waited}: whether it is stored is unknown; send this message again, at worst it comes twice"
        )
        behind = SendTimeout(f"{waited}: the brokers are behind, and it was not sent")
        for submission in late:
            unsent = unserved(submission.unsent_topics()) or behind
            submission.give_up(sent, unsent)
            self.outgoing.withdraw(submission)
        return True

    def end_all(self, error: Exception | None = None) -> None:
        """End every call: the client has failed with `error`, or was left."""
        sent = error or SendTimeout("the client was left before an answer came: outcome unknown")
        unsent = error or ClientClosed("the client was left before the message was sent")
        for submission in list(self._live):
            submission.give_up(sent, unsent)
            self.outgoing.withdraw(submission)
