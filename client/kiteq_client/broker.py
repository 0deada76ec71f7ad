"""One broker of the client's registry: connected again and again, with what it has not answered."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final

import anyio
from anyio.abc import ByteStream, TaskGroup

from kiteq.errors import KiteQError, NotConnected, Refused, SendTimeout
from kiteq.remoting.packets import Ask, Hello
from kiteq_client.deciding import Deciding
from kiteq_client.outgoing import Unanswered
from kiteq_client.preparing import Preparing
from kiteq_client.registry import Address
from kiteq_client.session import Session, Shared
from kiteq_client.transactions import Transactions

__all__ = ["Broker"]

logger = logging.getLogger("kiteq_client")

RECONNECT_SECONDS_MIN: Final = 0.05
RECONNECT_SECONDS_MAX: Final = 5.0
"""Waits grow from the one to the other, with jitter: a restarted broker is not met by all at once."""
REQUEST_MAX: Final = (1 << 32) - 1


class Broker:
    """Keeps a session with one address for as long as it runs.

    hello: makes the greeting for a request number. connected: called with each new session. failed: called
    when an attempt failed.
    `tried` is set when the first attempt has ended, well or not; `session` is None while there is none.
    """

    def __init__(
        self,
        address: Address,
        shared: Shared,
        transactions: Transactions,
        hello: Callable[[int], Hello],
        *,
        connected: Callable[[Session], None],
        failed: Callable[[], None],
    ) -> None:
        self.address = address
        self.session: Session | None = None
        self.unanswered = Unanswered(shared.outgoing, shared.timeout)
        self.preparing = Preparing(shared.outgoing, transactions.answered_late)
        self.deciding = Deciding(self.wake, transactions.settled, shared.timeout)
        self.error: Exception = NotConnected(f"{address} did not accept the connection within {shared.timeout:g} s")
        self.tried = anyio.Event()
        self.connects = 0
        self._shared = shared
        self._transactions = transactions
        self._hello = hello
        self._connected = connected
        self._on_failed = failed
        self._request = 0
        self._name = ""

    def next_request(self) -> int:
        """Return a request number; 0 is never used, as it means the connection."""
        self._request = self._request % REQUEST_MAX + 1
        return self._request

    @property
    def takes_messages(self) -> bool:
        """Whether new messages can go to this broker now."""
        return self.session is not None and self.session.takes_messages

    @property
    def load(self) -> int:
        """How many messages wait for this broker's answer."""
        return self.preparing.load + sum(len(frame.blobs) for frame in self.unanswered.frames.values())

    def wake(self) -> None:
        """There may be something to send."""
        if self.session is not None:
            self.session.wake()

    def asked(self, packet: Ask) -> None:
        """Answer what the broker asks about transactions."""
        self._transactions.asked(self, packet)

    async def run(self) -> None:
        """Connect, carry packets, connect again; until cancelled."""
        failures = 0
        while True:
            began = anyio.current_time()
            try:
                await self._connect_and_carry()
            # First, because NotConnected is an OSError too.
            except KiteQError as error:
                self._failed(error, failures)
            except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                # anyio says only that all attempts failed; why is in the cause.
                text = str(error.__cause__ or error) or "the connection was closed during the greeting"
                self._failed(NotConnected(f"{self.address} could not be reached: {text}"), failures)
            else:
                # A connection that lived is followed by a quick attempt, one that did not by a slower one.
                failures = 0 if anyio.current_time() - began > RECONNECT_SECONDS_MAX else failures
            delay_s = min(RECONNECT_SECONDS_MAX, RECONNECT_SECONDS_MIN * 2 ** min(failures, 10))
            failures += 1
            await anyio.sleep(delay_s * random.uniform(0.5, 1))

    def _failed(self, error: Exception, failures: int) -> None:
        self.error = error
        if failures == 0 or (isinstance(error, Refused) and failures < 3):
            logger.warning("not connected to %s: %s; trying on", self.address, error)
        self.tried.set()
        self._on_failed()

    async def _connect_and_carry(self) -> None:
        stream: ByteStream | None = None
        try:
            try:
                with anyio.fail_after(self._shared.timeout):
                    stream = await anyio.connect_tcp(self.address.host, self.address.port)
                    session = Session(stream, self, self._shared)
                    await session.greet(self._hello(self.next_request()))
            except TimeoutError as error:
                raise NotConnected(
                    f"{self.address} did not accept the connection within {self._shared.timeout:g} s"
                ) from error
            self._check_same_broker(session.broker)
            self.deciding.connected(session.broker)
            self.session = session
            self.connects += 1
            if self.connects > 1:
                logger.info("connected again to %s", self.address)
            self.tried.set()
            self._connected(session)
            async with anyio.create_task_group() as tasks:
                await self._carry(session, tasks)
        finally:
            if stream is not None:
                with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                    await stream.aclose()

    async def _carry(self, session: Session, tasks: TaskGroup) -> None:
        tasks.start_soon(self._end_after_goodbye, session)
        try:
            reason = await session.run()
        finally:
            self.session = None
            tasks.cancel_scope.cancel()
        self.error = NotConnected(f"the connection to {self.address} was lost: {reason}")
        expected = session.leaving  # said goodbye itself
        logger.log(logging.DEBUG if expected else logging.WARNING, "connection to %s ended: %s", self.address, reason)

    async def _end_after_goodbye(self, session: Session) -> None:
        """Once the broker said goodbye: finish what is open there, then leave."""
        await session.goodbye.wait()
        await session.wait_quiet()
        await session.leave()

    def _check_same_broker(self, name: str) -> None:
        """What another broker at this address did not answer, nobody will ever answer."""
        if self._name and name != self._name:
            error = SendTimeout(
                f"{self.address} is now broker {name}, so {self._name} will not answer: outcome unknown"
            )
            self.unanswered.refuse_all(error)
            self.preparing.refuse_all(error)
        self._name = name
