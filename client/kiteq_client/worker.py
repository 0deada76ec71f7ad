"""A worker: takes delivered messages, calls their handlers, answers the broker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

from kiteq.message import BadMessage, decode
from kiteq.remoting.packets import NACK_FAILED, NACK_REJECTED
from kiteq_client.handlers import Handler, Reject, RetryAfter
from kiteq_client.incoming import Incoming
from kiteq_client.session import Session
from kiteq_client.signal import Signal

__all__ = ["Worker"]

logger = logging.getLogger("kiteq_client")

SLICE_SECONDS: Final = 0.005
"""Handlers that never wait let the other tasks run this often; a checkpoint costs ten short handlers."""


class Worker:
    """Handles one message at a time, for as long as the client consumes.

    `since` is when the present handler began, None between messages; the client's watchdog reads it
    and calls `expire`. stopping: whether the client is cancelling its tasks.
    """

    def __init__(
        self,
        incoming: Incoming[Session],
        group: str,
        find: Callable[[str, str], Handler | None],
        *,
        timeout: float,
        stopping: Callable[[], bool],
        busy: Callable[[], None],
    ) -> None:
        self.since: float | None = None
        self.session: Session | None = None
        self.tag = -1
        self._incoming = incoming
        self._group = group
        self._find = find
        self._timeout = timeout
        self._stopping = stopping
        self._busy = busy
        self._ready = Signal()
        self._scope = anyio.CancelScope()
        self._expired = False
        self._unhandled: set[tuple[str, str]] = set()

    def expire(self) -> None:
        """Cancel the present handler: it ran too long."""
        self._expired = True
        self._scope.cancel()

    async def run(self) -> None:
        """Handle messages until cancelled. A scope lasts until a handler is timed out, not one message."""
        try:
            while True:
                self._expired = False
                with anyio.CancelScope() as self._scope:
                    await self._consume()
                if self.session is not None:
                    self._failed(f"TimeoutError: the handler ran longer than {self._timeout:g} s")
                    self.session = self.since = None
        finally:
            if self.session is not None:
                self._failed("the client left before the handler was done")
                self.session = self.since = None

    async def _consume(self) -> None:
        incoming, find, group = self._incoming, self._find, self._group
        known: dict[tuple[str, str], Handler] = {}
        slice_end = 0.0
        while not self._expired:
            now = monotonic()
            if now >= slice_end:
                self.since = None
                await checkpoint()
                slice_end = now + SLICE_SECONDS
            taken = incoming.take()
            if taken is None:
                self.since = None
                await self._wait()
                slice_end = monotonic() + SLICE_SECONDS
                continue
            session, tag, blob, attempt = taken
            self.tag, self.session = tag, session
            self.since = now
            yield_now = False
            try:
                message = decode(blob, group, attempt)
                address = (message.topic, message.message_type)
                handler = known.get(address)
                if handler is None:
                    handler = find(*address)
                    if handler is None:
                        yield_now = self._no_handler(*address)
                        self.session = None
                        continue
                    known[address] = handler
                await handler(message)
            except BadMessage as error:
                logger.warning("a damaged message from %s is rejected: %s", session.broker, error)
                yield_now = session.nack(tag, NACK_REJECTED, None, str(error))
            except BaseException as error:
                if isinstance(error, anyio.get_cancelled_exc_class()) and (
                    self._scope.cancel_called or self._stopping()
                ):
                    raise
                yield_now = self._raised(error, blob, attempt)
            else:
                yield_now = session.ack(tag)
            self.session = None
            if yield_now:
                await checkpoint()

    async def _wait(self) -> None:
        wake = self._ready.set
        self._incoming.wake_with(wake)
        try:
            await self._ready.wait()
        finally:
            self._incoming.no_longer(wake)
        self._busy()

    def _no_handler(self, topic: str, message_type: str) -> bool:
        if (topic, message_type) not in self._unhandled and len(self._unhandled) < 1_000:
            self._unhandled.add((topic, message_type))
            logger.warning("no handler for %s/%s: its messages are nacked", topic, message_type)
        return self._failed(f"no handler for {topic}/{message_type}")

    def _raised(self, error: BaseException, blob: bytes, attempt: int) -> bool:
        session, tag = self.session, self.tag
        assert session is not None
        if isinstance(error, RetryAfter):
            return session.nack(tag, NACK_FAILED, round(error.seconds * 1000), str(error))
        if isinstance(error, Reject):
            return session.nack(tag, NACK_REJECTED, None, error.reason)
        text = f"{type(error).__name__}: {error}"
        logger.warning("attempt %d at message %s failed: %s", attempt, blob[:16].hex(), text, exc_info=error)
        return session.nack(tag, NACK_FAILED, None, text)

    def _failed(self, text: str) -> bool:
        session = self.session
        assert session is not None
        return session.nack(self.tag, NACK_FAILED, None, text)
