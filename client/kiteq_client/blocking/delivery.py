"""Messages taken one by one from a blocking client."""

from __future__ import annotations

import asyncio
import os
import threading

import anyio

from kiteq_client import delivery as asynchronous
from kiteq_client.blocking.portal import Portal, refuse_event_loop

__all__ = ["Deliveries", "Delivery"]


class Delivery(asynchronous.Delivered):
    """One attempt to hand over one message; answer it once, with `ack`, `nack` or `reject`, from any thread.

    An answer leaves at once or within two milliseconds, together with others. After the connection was
    lost it has no effect: the broker delivers the message again.
    """

    __slots__ = ("_delivery", "_pid", "_portal")

    def __init__(self, delivery: asynchronous.Delivery, portal: Portal) -> None:
        super().__init__(delivery.message)
        self._delivery = delivery
        self._portal = portal
        self._pid = os.getpid()

    def ack(self) -> None:
        """It is done. Raises `RuntimeError` if it is answered already, or was taken before a fork."""
        self._check_process()
        self._portal.call(self._delivery.ack)

    def nack(self, error: str = "", after: float | None = None) -> None:
        """This attempt failed; the broker tries again, after `after` seconds if given. Raises as `ack`."""
        self._check_process()
        self._portal.call(self._delivery.nack, error, after)

    def reject(self, reason: str = "rejected") -> None:
        """It can never be handled: it becomes a dead letter at once. Raises as `ack`."""
        self._check_process()
        self._portal.call(self._delivery.reject, reason)

    def _check_process(self) -> None:
        refuse_event_loop()
        if os.getpid() != self._pid:
            raise RuntimeError(f"this delivery was taken by process {self._pid}, and only that can answer it")


class Deliveries:
    """The iterator behind `client.deliveries()`: the broker sends while it exists.

    Several threads may iterate one; each message goes to one of them. Make it in the event loop.
    """

    def __init__(self, deliveries: asynchronous.Deliveries, portal: Portal) -> None:
        self._deliveries = deliveries
        self._portal = portal
        self._pid = os.getpid()
        self._turn = threading.Lock()
        self._taking = anyio.Lock()
        self._taken: asynchronous.Delivery | None = None
        """Taken and not yet returned: a `KeyboardInterrupt` may come between the two."""

    def __iter__(self) -> Deliveries:
        return self

    def __next__(self) -> Delivery:
        refuse_event_loop()
        if os.getpid() != self._pid:
            raise RuntimeError("these deliveries belong to the process before the fork; call deliveries() again")
        with self._turn:
            delivery = self._portal.call(self._take)
            if delivery is None:
                raise StopIteration
            self._taken = None
        return Delivery(delivery, self._portal)

    async def _take(self) -> asynchronous.Delivery | None:
        # An interrupted call may still be on its way out of here when the next one comes.
        async with self._taking:
            if self._taken is None:
                try:
                    self._taken = await anext(self._deliveries)
                except StopAsyncIteration:
                    return None
            return self._taken

    def close(self) -> None:
        """Stop: what was not taken goes back to the broker; what was taken can still be answered."""
        if os.getpid() != self._pid:
            return
        # Nothing waits here, as this may be called while garbage is collected. The event loop holds the last
        # references then, so the inner iterator ends there too.
        self._portal.call_soon(_end, self._deliveries, self._taken)
        self._taken = None

    def __del__(self) -> None:
        # Leaving `for` by `break` drops the iterator; only this hook sees it.
        self.close()


_giving_back: set[asyncio.Task[None]] = set()


def _end(deliveries: asynchronous.Deliveries, taken: asynchronous.Delivery | None) -> None:
    deliveries.close()
    if taken is not None:
        # A task of its own, as the call that took it was interrupted and is gone.
        task = asyncio.create_task(taken.nack("interrupted before the program had it"))
        _giving_back.add(task)
        task.add_done_callback(_giving_back.discard)
