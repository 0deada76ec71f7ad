"""The receiving half of a client: its workers, or the one loop over its deliveries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import anyio

from kiteq.limits import DRAIN_SECONDS
from kiteq_client.delivery import Deliveries
from kiteq_client.handlers import Handler
from kiteq_client.incoming import Incoming
from kiteq_client.session import Session
from kiteq_client.worker import Worker

__all__ = ["Consumer"]

LEAVE_POLL_SECONDS: Final = 0.005
"""How often leaving looks whether the handlers are done; only then is anything polled."""


class Consumer:
    """Keeps what was delivered and is not answered.

    find: the handler of a topic and message type; None for a client without handlers.
    sessions: the connections of the moment. busy: called when a handler starts after a pause.
    """

    def __init__(
        self,
        group: str,
        find: Callable[[str, str], Handler | None] | None,
        *,
        prefetch: int,
        concurrency: int,
        handler_timeout: float,
        sessions: Callable[[], list[Session]],
        busy: Callable[[], None],
    ) -> None:
        self.incoming: Incoming[Session] = Incoming()
        self.has_handlers = find is not None
        self.stopping = False
        self._group = group
        self._prefetch = prefetch
        self._handler_timeout = handler_timeout
        self._sessions = sessions
        self._open: dict[tuple[Session, int], None] = {}
        self._scope: anyio.CancelScope | None = None
        self._workers = [
            Worker(self.incoming, group, find, timeout=handler_timeout, stopping=lambda: self.stopping, busy=busy)
            for _ in range(concurrency)
            if find is not None
        ]
        self.incoming.accepting = self.has_handlers

    # --- handlers ------------------------------------------------------------------------------
    async def run_workers(self) -> None:
        """Handle messages until `finish`."""
        with anyio.CancelScope() as self._scope:
            async with anyio.create_task_group() as tasks:
                for worker in self._workers:
                    tasks.start_soon(worker.run)

    @property
    def is_handling(self) -> bool:
        """Whether a handler runs now."""
        return any(worker.session is not None for worker in self._workers)

    def expire_handlers(self, now: float) -> None:
        """Cancel the handlers that run too long."""
        for worker in self._workers:
            if worker.since is not None and now - worker.since > self._handler_timeout:
                worker.expire()

    async def finish(self) -> None:
        """Take no more, hand back what was not started, wait for the handlers, cancel them in the end."""
        self._stop_taking()
        self._open.clear()
        with anyio.move_on_after(DRAIN_SECONDS):
            while self.is_handling:  # noqa: ASYNC110 no event per message for this one moment
                await anyio.sleep(LEAVE_POLL_SECONDS)
        self.stopping = True
        if self._scope is not None:
            self._scope.cancel()
            while self.is_handling:  # noqa: ASYNC110 the same
                await anyio.sleep(LEAVE_POLL_SECONDS)

    # --- deliveries ----------------------------------------------------------------------------
    def deliveries(self, check: Callable[[], None]) -> Deliveries:
        """Return an iterator; `check` raises when the client cannot be used any more."""
        if self.has_handlers:
            raise RuntimeError("this client has handlers; deliveries() is for clients without")
        return Deliveries(
            self.incoming, self._group, self._open, begin=self._begin_deliveries, end=self._stop_taking, check=check
        )

    def _begin_deliveries(self) -> None:
        if self.incoming.accepting:
            raise RuntimeError("deliveries() is iterated already")
        self.incoming.accepting = True
        for session in self._sessions():
            session.grant(self._prefetch)

    def _stop_taking(self) -> None:
        if self.incoming.accepting:
            self.incoming.accepting = False
            for session in self._sessions():
                session.grant(0)
            for session, first, last in self.incoming.clear():
                session.hand_back(first, last)

    # --- connections ---------------------------------------------------------------------------
    def connected(self, session: Session) -> None:
        """Let a new connection deliver, if anybody takes messages; forget what came by dead ones."""
        for key in [key for key in self._open if not key[0].alive]:
            del self._open[key]
        if self.incoming.accepting:
            session.grant(self._prefetch)

    def held_tags(self, session: Session) -> list[int]:
        """Return the tags of a connection that handlers or deliveries hold."""
        tags = [worker.tag for worker in self._workers if worker.session is session]
        return tags + [tag for owner, tag in self._open if owner is session]
