"""Messages taken one by one, where a program wants its own loop instead of handlers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Final

from anyio.lowlevel import checkpoint

from kiteq.message import BadMessage, Received, decode
from kiteq.remoting.packets import NACK_FAILED, NACK_REJECTED
from kiteq_client.incoming import Incoming
from kiteq_client.session import Session
from kiteq_client.signal import Signal

__all__ = ["Delivered", "Deliveries", "Delivery"]

SLICE_SECONDS: Final = 0.005
"""A loop whose body never waits lets the other tasks run this often."""


class Delivered:
    """What is known of one attempt to hand over one message, however it is answered."""

    __slots__ = ("message",)

    def __init__(self, message: Received) -> None:
        self.message = message

    @property
    def id(self) -> bytes:
        """The id of the message."""
        return self.message.id

    @property
    def topic(self) -> str:
        """The topic of the message."""
        return self.message.topic

    @property
    def message_type(self) -> str:
        """The type of the message."""
        return self.message.message_type

    @property
    def body(self) -> bytes:
        """The body of the message."""
        return self.message.body

    @property
    def text(self) -> str:
        """The body of the message decoded as UTF-8."""
        return self.message.text

    @property
    def properties(self) -> Mapping[str, str]:
        """The properties of the message."""
        return self.message.properties

    @property
    def group(self) -> str:
        """The group it is delivered to."""
        return self.message.group

    @property
    def created_at(self) -> float:
        """When the producer made it, in seconds since 1970."""
        return self.message.created_at

    @property
    def attempt(self) -> int:
        """Which attempt this is, 1 for the first."""
        return self.message.attempt

    def __repr__(self) -> str:
        return f"Delivery({self.message!r}, attempt={self.attempt})"


class Delivery(Delivered):
    """One attempt to hand over one message; answer it once, with `ack`, `nack` or `reject`.

    An answer leaves at once or within two milliseconds, together with others. After the connection was
    lost it has no effect: the broker delivers the message again.
    """

    __slots__ = ("_answered", "_open", "_session", "_tag")

    def __init__(
        self, message: Received, session: Session, tag: int, still_open: dict[tuple[Session, int], None]
    ) -> None:
        super().__init__(message)
        self._session = session
        self._tag = tag
        self._open = still_open
        self._answered = False

    async def ack(self) -> None:
        """It is done."""
        self._close()
        if self._session.ack(self._tag):
            await checkpoint()

    async def nack(self, error: str = "", after: float | None = None) -> None:
        """This attempt failed; the broker tries again, after `after` seconds if given."""
        self._close()
        if self._session.nack(self._tag, NACK_FAILED, None if after is None else round(after * 1000), error):
            await checkpoint()

    async def reject(self, reason: str = "rejected") -> None:
        """It can never be handled: it becomes a dead letter at once."""
        self._close()
        if self._session.nack(self._tag, NACK_REJECTED, None, reason):
            await checkpoint()

    def _close(self) -> None:
        if self._answered:
            raise RuntimeError("this delivery is answered already")
        self._answered = True
        self._open.pop((self._session, self._tag), None)


class Deliveries:
    """The iterator behind `client.deliveries()`: the broker sends while it exists.

    begin, end: called when the first message is asked for, and when the iterator is closed or dropped.
    check: raises when the client has failed or was left.
    """

    def __init__(
        self,
        incoming: Incoming[Session],
        group: str,
        still_open: dict[tuple[Session, int], None],
        *,
        begin: Callable[[], None],
        end: Callable[[], None],
        check: Callable[[], None],
    ) -> None:
        self._incoming = incoming
        self._group = group
        self._open = still_open
        self._begin = begin
        self._end = end
        self._check = check
        self._state = "new"
        self._ready = Signal()
        self._slice_end = 0.0

    def __aiter__(self) -> Deliveries:
        return self

    async def __anext__(self) -> Delivery:
        if self._state == "closed":
            raise StopAsyncIteration
        if self._state == "new":
            self._begin()
            self._state = "open"
        if monotonic() >= self._slice_end:
            await checkpoint()
            self._slice_end = monotonic() + SLICE_SECONDS
        while True:
            self._check()
            taken = self._incoming.take()
            if taken is None:
                self._incoming.wake_with(self._ready.set)
                try:
                    await self._ready.wait()
                finally:
                    self._incoming.no_longer(self._ready.set)
                self._slice_end = monotonic() + SLICE_SECONDS
                continue
            session, tag, blob, attempt = taken
            try:
                message = decode(blob, self._group, attempt)
            except BadMessage as error:
                session.nack(tag, NACK_REJECTED, None, str(error))
                continue
            self._open[session, tag] = None
            return Delivery(message, session, tag, self._open)

    def close(self) -> None:
        """Stop: what was not taken goes back to the broker; what was taken can still be answered."""
        if self._state == "open":
            self._state = "closed"
            self._end()
        self._state = "closed"

    def __del__(self) -> None:
        # Leaving `async for` by `break` drops the iterator; only this hook sees it.
        self.close()
