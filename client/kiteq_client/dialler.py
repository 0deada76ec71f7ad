"""One address at which a broker listens: connected again and again, for as long as that makes sense."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import anyio
from anyio.abc import ByteStream, TaskGroup

from kiteq.binding.bindings import Binding
from kiteq.errors import KiteQError, NotConnected, Refused, RemoteProtocolError
from kiteq.limits import BODY_BYTES_MAX_DEFAULT, FRAME_OVERHEAD_BYTES
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import Goodbye, Packet, Subscribe, Unsubscribe
from kiteq_client.greeting import Greeting, greet, key_of, subscribing, unsubscribing
from kiteq_client.members import Member
from kiteq_client.registry import Address
from kiteq_client.session import Session
from kiteq_client.shared import Shared
from kiteq_client.signal import Signal
from kiteq_client.unanswered import DRAINING

if TYPE_CHECKING:
    from kiteq_client.broker import Broker

__all__ = ["Dialler"]

logger = logging.getLogger("kiteq_client")

RECONNECT_SECONDS_MIN: Final = 0.05
RECONNECT_SECONDS_MAX: Final = 5.0
"""Waits grow from the one to the other, with jitter: a restarted broker is not met by all at once."""
RECONNECT_WANTED_SECONDS_MAX: Final = 0.5
"""The same while somebody waits for this broker: one that came back must not stay unnoticed for long."""
RENEW_POLL_SECONDS: Final = 0.05
"""How often a connection that is to be made anew is looked at, until nothing is under way."""
GOODBYE_REQUEST: Final = 2


class _Owner(Protocol):
    """The brokers of a client, as its diallers see them. leaving: the client says goodbye and needs no more."""

    leaving: bool

    def claim(self, dialler: Dialler, name: str) -> Broker | None:
        """Return the broker that calls itself so, None if it is connected already, or if the client leaves."""

    def connected(self, broker: Broker, session: Session) -> None:
        """Use a new connection."""

    def lost(self, broker: Broker) -> None:
        """Use a connection no more."""

    def failed(self) -> None:
        """Note that an attempt has ended without a connection."""

    def wake_writers(self) -> None:
        """Let another connection take what waits."""

    def told(self, dialler: Dialler, addresses: list[str]) -> None:
        """Learn the addresses of the set that a broker belongs to."""

    def is_missed(self, dialler: Dialler) -> bool:
        """Whether somebody waits for the broker at this address."""


class Dialler:
    """Keeps a connection to one address while it is listed, or while the broker there owes us something.

    member: as the list or the registry has it. broker: that was met there last, or is to be met first.
    twin: the broker at this address when it is connected through another address; that connection is used.
    `tried` is set when the first attempt has ended, well or not.
    """

    def __init__(self, member: Member, shared: Shared, greeting: Greeting, owner: _Owner) -> None:
        self.member = member
        self.listed = True
        self.broker: Broker | None = None
        self.twin: Broker | None = None
        self.session: Session | None = None
        self.started = False
        self.tried = anyio.Event()
        self.connects = 0
        self.again = Signal()
        self.bindings_changed = Signal()
        self._shared = shared
        self._greeting = greeting
        self._owner = owner
        self._said_goodbye = False
        self._unsaid: list[str] = []
        self.error: Exception = NotConnected(
            f"{self.address} did not accept the connection within {shared.timeout:g} s"
        )

    @property
    def address(self) -> Address:
        """Where it dials."""
        return self.member.address

    @property
    def is_wanted(self) -> bool:
        """Whether to dial."""
        return self.listed or (self.broker is not None and self.broker.is_open)

    @property
    def is_refused(self) -> bool:
        """Whether the broker has refused for good."""
        return self.tried.is_set() and isinstance(self.error, Refused) and not self.error.temporary

    def unlist(self, why: str) -> None:
        """Dial no more than the broker owes us; a connection is used as long as it lives."""
        self.listed = False
        self.again.set()
        stays = self.session is not None and not self.session.leaving
        what = ": its connection is used as long as it lives" if stays else ""
        logger.info("broker %s is %s%s", self.address, why, what)

    async def run(self) -> None:
        """Connect, carry packets, connect again; until cancelled, or until nobody wants that any more."""
        failures = 0
        while self.is_wanted:
            began = anyio.current_time()
            self.again = Signal()  # what was said before this attempt is what it is made for
            try:
                await self._connect_and_carry()
            # First, because NotConnected is an OSError too.
            except KiteQError as error:
                self._failed(error, failures)
            except (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                self._failed(NotConnected(f"{self.address} could not be reached: {_why(error)}"), failures)
            else:
                # A connection that lived is followed by a quick attempt, one that did not by a slower one.
                failures = 0 if anyio.current_time() - began > RECONNECT_SECONDS_MAX else failures
            delay_s = min(RECONNECT_SECONDS_MAX, RECONNECT_SECONDS_MIN * 2 ** min(failures, 10))
            failures = 0 if await self._pause(delay_s * random.uniform(0.5, 1)) else failures + 1

    async def _pause(self, seconds: float) -> bool:
        """Wait before the next attempt; return True if somebody has said that it is worthwhile now."""
        if self._owner.leaving:
            await anyio.sleep_forever()  # the client cancels it
        until = anyio.current_time() + seconds
        while self.is_wanted and (self.twin is not None or anyio.current_time() < until):
            left_s = RECONNECT_WANTED_SECONDS_MAX
            if self.twin is None:
                left_s = min(left_s, until - anyio.current_time())
            with anyio.move_on_after(left_s * random.uniform(0.5, 1) if left_s > RECONNECT_SECONDS_MIN else left_s):
                await self.again.wait()
                return True
            if self.twin is None and self._owner.is_missed(self):
                return False
        return False

    def _failed(self, error: KiteQError, failures: int) -> None:
        self.error = error
        leaving = isinstance(error, Refused) and error.code == DRAINING
        if failures == 0 or (isinstance(error, Refused) and failures < 3):
            expected = leaving or (self._said_goodbye and isinstance(error, NotConnected))
            logger.log(
                logging.INFO if expected else logging.WARNING, "not connected to %s: %s; trying on", self.address, error
            )
        self._said_goodbye = self._said_goodbye or leaving
        self.tried.set()
        self._owner.failed()

    async def _connect_and_carry(self) -> None:
        stream: ByteStream | None = None
        try:
            decoder = Decoder(BODY_BYTES_MAX_DEFAULT + FRAME_OVERHEAD_BYTES)
            try:
                with anyio.fail_after(self._shared.timeout):
                    stream = await anyio.connect_tcp(self.address.host, self.address.port)
                    serves = self.member.serves_topic  # of this moment: meanwhile more may be announced
                    hello = self._greeting.hello(serves)
                    brought = {key_of(one): one for one in self._greeting.bindings if serves(one.topic)}
                    self._unsaid = [topic for topic in self._greeting.topics if topic not in hello.topics]
                    welcome, first = await greet(stream, decoder, hello)
            except TimeoutError as error:
                raise NotConnected(
                    f"{self.address} did not accept the connection within {self._shared.timeout:g} s"
                ) from error
            except UnicodeError as error:
                raise NotConnected(f"{self.address} could not be reached: no host has this name: {error}") from error
            broker = self._owner.claim(self, welcome.broker)
            if broker is None:
                why = "leaving" if self._owner.leaving else "connected already"
                logger.debug("%s is broker %s: %s", self.address, welcome.broker, why)
                await stream.send(encode_packet(Goodbye(GOODBYE_REQUEST, why)))
                self.tried.set()
                self._owner.failed()
                return
            broker.brought = brought
            session = Session(stream, decoder, welcome, broker, self._shared, self._told)
            await self._use(broker, session, first)
        finally:
            if stream is not None:
                with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                    await stream.aclose()

    async def _use(self, broker: Broker, session: Session, first: list[Packet]) -> None:
        self.connects += 1
        logger.info("connected%s to %s, broker %s", " again" if self.connects > 1 else "", self.address, session.broker)
        self._said_goodbye = False
        self.session = session
        broker.serves = self.member.serves
        try:
            self._owner.connected(broker, session)
            self.tried.set()
            async with anyio.create_task_group() as tasks:
                await self._carry(broker, session, first, tasks)
        finally:
            self.session = None
            self._owner.lost(broker)

    async def _carry(self, broker: Broker, session: Session, first: list[Packet], tasks: TaskGroup) -> None:
        tasks.start_soon(self._end_after_goodbye, session)
        tasks.start_soon(self._bring_bindings, broker, session)
        try:
            reason = await session.run(first)
        finally:
            broker.session = None
            tasks.cancel_scope.cancel()
        self.error = NotConnected(f"the connection to {self.address} was lost: {reason}")
        self._said_goodbye = session.goodbye.is_set()
        expected = session.leaving  # said goodbye itself
        logger.log(logging.DEBUG if expected else logging.WARNING, "connection to %s ended: %s", self.address, reason)

    async def _end_after_goodbye(self, session: Session) -> None:
        """Once the broker said goodbye: finish what is open there, then leave."""
        await session.goodbye.wait()
        self._owner.wake_writers()
        await session.wait_quiet()
        await session.leave()

    async def _bring_bindings(self, broker: Broker, session: Session) -> None:
        """Bring what the greeting did not, and take back what it should not have: both change meanwhile.

        Topics to be published can only be told by another greeting.
        """
        while True:
            change = self._next_change(broker)
            if change is None:
                is_old = any(map(broker.serves_topic, self._unsaid))
                if is_old and session.is_quiet:
                    self.again.set()
                    await session.leave()
                    return
                with anyio.move_on_after(RENEW_POLL_SECONDS if is_old else math.inf):
                    await self.bindings_changed.wait()
                continue
            binding, packet = change
            try:
                await session.ask(packet)
            except KiteQError as error:
                logger.warning("%s did not take a change of the binding %s: %s", self.address, binding, error)

    def _next_change(self, broker: Broker) -> tuple[Binding, Callable[[int], Subscribe | Unsubscribe]] | None:
        """Return what differs from what the broker was told, and how it is told; it counts as told."""
        wanted = {key_of(binding): binding for binding in self._greeting.bindings}
        for key, one in broker.brought.items():
            if key not in wanted:
                del broker.brought[key]
                return one, unsubscribing(one)
        for key, one in wanted.items():
            if broker.brought.get(key) != one and broker.serves_topic(one.topic):
                broker.brought[key] = one
                return one, subscribing(one)
        return None

    def _told(self, addresses: list[str]) -> None:
        try:
            self._owner.told(self, addresses)
        except ValueError as error:
            raise RemoteProtocolError(f"Brokers names a wrong address: {error}"[:200]) from error


def _why(error: Exception) -> str:
    """Return why nobody was reached: anyio says only that all attempts failed, and their errors are the cause."""
    cause = error.__cause__ or error
    errors = cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause,)
    return "; ".join(dict.fromkeys(filter(None, map(str, errors)))) or "the connection was closed during the greeting"
