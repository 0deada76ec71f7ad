"""The brokers of a client: which are dialled, which are connected, and which one takes what.

Theory of operation. `Members` tells which addresses there are; each that matters to this client has a
`Dialler`. What was sent belongs to a `Broker`, which is known by its name and may change its address. A
broker that is not listed any more keeps its connection, and is dialled again only while it owes us
something: its session with ZooKeeper may have ended, or it has left for good.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Final

import anyio

from kiteq.binding.bindings import Binding
from kiteq.errors import NotConnected, Refused, SendTimeout
from kiteq_client.broker import Broker, ask_all
from kiteq_client.dialler import Dialler
from kiteq_client.greeting import Greeting, key_of, subscribing, unsubscribing
from kiteq_client.members import Member, Members
from kiteq_client.registry import Address
from kiteq_client.session import Session
from kiteq_client.shared import Shared
from kiteq_client.signal import Signal
from kiteq_client.spread import Spread, serving
from kiteq_client.transactions import Transactions
from kiteq_client.unanswered import DRAINING

__all__ = ["Brokers"]

logger = logging.getLogger("kiteq_client")

OTHERS_SECONDS: Final = 0.5
"""Once one broker has accepted, how long entering waits to hear of the others."""

WAIT_POLL_SECONDS: Final = 0.02
"""How often a subscription looks whether a broker of its topic is connected; only then is it polled."""

Work = Callable[[], Awaitable[None]]


class Brokers:
    """All brokers of a client; `equip` names what they share, before anything else is called.

    `progress` is set when a connection was made or failed; once `leaving`, none is made any more. `all` has the
    brokers that are connected, or were and owe us something; `diallers` those that are dialled.
    """

    def __init__(self, greeting: Greeting, members: Members) -> None:
        self.all: list[Broker] = []
        self.diallers: dict[Address, Dialler] = {}
        self.members = members
        self.progress = Signal()
        self.reconnects = 0
        self.leaving = False
        self._greeting = greeting
        self._published = set(greeting.topics)
        self._topics = {*greeting.topics, *(binding.topic for binding in greeting.bindings)}
        self._wants_all = not self._topics or not members.has_topics
        self._new = Signal()
        self._spread: Spread
        self._shared: Shared
        self._transactions: Transactions
        self._make: Callable[[], Broker]
        self._connected: Callable[[Session], None]

    def equip(self, shared: Shared, transactions: Transactions, connected: Callable[[Session], None]) -> None:
        """Name what the connections have in common, and who uses a new one."""
        self._shared = shared
        self._transactions = transactions
        self._spread = Spread(self.all, shared.outgoing, by_topic=self.members.has_topics)
        self._make = partial(Broker, shared, transactions, self._spread.take, shared.timeout)
        self._connected = connected
        for address, member in self.members.known().items():
            self._add(member)
            # What is decided before anybody answers there waits for whoever does.
            self.diallers[address].broker = broker = self._make()
            self.all.append(broker)

    # --- which are dialled ---------------------------------------------------------------------
    async def run(self, guarded: Callable[[Work], Coroutine[Any, Any, None]]) -> None:
        """Dial all that should be; `guarded` runs each task."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(guarded, partial(self.members.run, self.refresh))
            while True:
                for dialler in self.diallers.values():
                    if not dialler.started:
                        dialler.started = True
                        tasks.start_soon(guarded, partial(self._dial, dialler))
                await self._new.wait()

    async def _dial(self, dialler: Dialler) -> None:
        await dialler.run()
        del self.diallers[dialler.address]
        dialler.broker = None
        self._forget_settled()
        self.progress.set()

    def _add(self, member: Member) -> Dialler:
        dialler = Dialler(member, self._shared, self._greeting, self)
        self.diallers[member.address] = dialler
        self._new.set()
        return dialler

    def refresh(self) -> None:
        """Compare what is dialled with what there is."""
        announced = self.members.known()
        known = {address: member for address, member in announced.items() if self._wants(member)}
        for address, member in known.items():
            dialler = self.diallers.get(address)
            if dialler is not None and member == dialler.member and dialler.listed:
                continue
            if dialler is None:
                logger.info("broker %s found in %s", address, self.members.source)
                dialler = self._add(member)
            elif not dialler.listed:
                logger.info("broker %s is back in %s", address, self.members.source)
            self._meet(dialler, member)
        for dialler in self.diallers.values():
            if dialler.address in known:
                continue
            dialler.member = announced.get(dialler.address, dialler.member)
            if dialler.listed:
                gone = "only for other topics in" if dialler.address in announced else "gone from"
                dialler.unlist(f"{gone} {self.members.source}")
        self.progress.set()
        self.wake_writers()

    def _meet(self, dialler: Dialler, member: Member) -> None:
        """A broker is announced, again or otherwise than before."""
        is_new_start = member.epoch != dialler.member.epoch
        dialler.member = member
        dialler.listed = True
        if dialler.session is None:
            owing = self._named(member.name)
            if owing is not None and owing.session is None and dialler.broker is None:
                self._give(owing, dialler)
            dialler.again.set()
        elif dialler.broker is not None:
            # One start of a broker keeps its topics, and announces one after the other.
            dialler.broker.serves = member.serves if is_new_start else member.serves_also(dialler.broker.serves)
            dialler.bindings_changed.set()

    def _wants(self, member: Member) -> bool:
        return self._wants_all or member.serves is None or not self._topics.isdisjoint(member.serves)

    def name_topics(self, topics: Iterable[str]) -> None:
        """Note that this client publishes these topics from now on."""
        if self.members.has_topics and (new := set(topics) - self._published):
            self._published |= new
            self._greeting.topics += sorted(new)
            self._name(new)

    def _name(self, topics: set[str]) -> None:
        if not topics <= self._topics:
            self._topics |= topics
            self.refresh()

    # --- what the diallers ask -----------------------------------------------------------------
    def claim(self, dialler: Dialler, name: str) -> Broker | None:
        """Return the broker that calls itself so, None if it is connected already, or if the client leaves."""
        if self.leaving:
            return None
        before, known = dialler.broker, self._named(name)
        dialler.twin = None
        if known is not None and known.session is not None:
            dialler.twin = known
            if any(one.broker is known and one.member.is_before(dialler.member) for one in self.diallers.values()):
                # Nothing may come from there that would end the line by itself.
                known.session.abandon(f"the broker has started again at {dialler.address}")
            return None
        if known is None:
            if before is not None and not before.name:
                known = before
            else:
                known = self._make()
                self.all.append(known)
            known.name = name
        self._give(known, dialler)
        if before is not None and before is not known and before.name and not self._may_return(before, dialler):
            error = SendTimeout(
                f"{dialler.address} is now broker {name}, so {before.name} will not answer: outcome unknown"
            )
            before.unanswered.refuse_all(error)
            before.preparing.refuse_all(error)
        self._forget_settled()
        return known

    def _give(self, broker: Broker, dialler: Dialler) -> None:
        for other in self.diallers.values():
            if other.broker is broker:
                other.broker = None
        dialler.broker = broker

    def _named(self, name: str) -> Broker | None:
        return next((broker for broker in self.all if broker.name == name), None) if name else None

    def _may_return(self, broker: Broker, gone_from: Dialler) -> bool:
        """Whether a broker may be at an address that is not connected."""
        return any(
            one is not gone_from and one.session is None and one.twin is None and one.member.name in ("", broker.name)
            for one in self.diallers.values()
        )

    def _forget_settled(self) -> None:
        """Forget brokers that nobody dials and that owe us nothing."""
        dialled = [dialler.broker for dialler in self.diallers.values()]
        for one in [one for one in self.all if one not in dialled and not (one.name and one.is_open)]:
            self.all.remove(one)
            # What nobody waits for any more still has room of the window.
            one.unanswered.give_up(connected=False)
            one.preparing.forget_given_up()

    def remembered(self, broker: Broker) -> Broker:
        """Return who is this broker now, for something that it owes us from now on; it may be forgotten."""
        if broker not in self.all:
            broker = self._named(broker.name) or broker
            if broker not in self.all:
                self.all.append(broker)
        return broker

    def connected(self, broker: Broker, session: Session) -> None:
        """Use a new connection."""
        broker.deciding.connected(session.broker)
        broker.session = session
        self.reconnects += broker.was_connected
        broker.was_connected = True
        self._connected(session)
        self.progress.set()
        self.wake_writers()

    def lost(self, broker: Broker) -> None:
        """Use a connection no more; who has found the same broker elsewhere may try again."""
        for dialler in self.diallers.values():
            if dialler.twin is broker:
                dialler.twin = None
                dialler.again.set()
        self.progress.set()
        self.wake_writers()

    def wake_writers(self) -> None:
        """There may be something to send."""
        self._spread.wake()

    def failed(self) -> None:
        """Note that an attempt has ended without a connection."""
        self.progress.set()

    def told(self, dialler: Dialler, addresses: list[str]) -> None:
        """Learn the addresses of the set that a broker belongs to. Raises `ValueError`."""
        self.members.told(dialler.address, addresses)
        self.refresh()

    def is_missed(self, dialler: Dialler) -> bool:
        """Whether somebody waits for the broker at this address."""
        if self._transactions.placing.unplaced or (dialler.broker is not None and dialler.broker.is_open):
            return True
        lanes = self._shared.outgoing.lanes.values()
        return any(
            lane.count and dialler.member.serves_topic(lane.topic) and not serving(self.all, (lane.topic,))
            for lane in lanes
        )

    # --- which are connected -------------------------------------------------------------------
    def sessions(self) -> list[Session]:
        """Return the connections of the moment."""
        return [broker.session for broker in self.all if broker.session is not None]

    def connected_sessions(self) -> list[Session]:
        """Return the connections of the moment. Raises `not_connected` if there is none."""
        sessions = self.sessions()
        if not sessions:
            raise self.not_connected()
        return sessions

    def not_connected(self, topics: Iterable[str] = ()) -> Exception:
        """Return why there is no connection to a broker of these topics: a refusal, if that is all they gave."""
        if self.members.refusal is not None and not self.diallers:
            return self.members.refusal
        away = self.away()
        refusals = [one for one in away.values() if isinstance(one, Refused) and one.code != DRAINING]
        if refusals and (len(refusals) == len(away) or not any(one.connects for one in self.diallers.values())):
            return refusals[0]
        problem = self.members.problem(sorted(set(topics) or self._topics))
        why = [f"{address}: {one}" if isinstance(one, Refused) else str(one) for address, one in away.items()]
        why += [f"broker {one.name} is shutting down" for one in self.all if one.session and not one.takes_messages]
        return NotConnected("; ".join([problem, *why] if problem else why) or "no broker is left")

    def away(self) -> dict[str, Exception]:
        """Return why, by address, for the brokers that are not connected."""
        return {
            str(one.address): one.error for one in self.diallers.values() if one.session is None and one.twin is None
        }

    def unserved(self, topics: Iterable[str]) -> Exception | None:
        """Return why nothing can be sent to one of these topics, None if a broker of each is connected."""
        missing = {topic for topic in topics if not serving(self.all, (topic,))}
        if serving(self.all, ()) and (not missing or not self.members.has_topics):
            return None
        return self.not_connected(missing)

    def refuse_together(self, topics: Iterable[str]) -> Refused | None:
        """Return why one transaction cannot have all these topics; None if a broker serves all, or may yet."""
        members, wanted = list(self.members.known().values()), set(topics)
        if len(wanted) < 2 or not self.members.has_topics or serving(self.all, wanted):
            return None
        if any(all(map(member.serves_topic, wanted)) for member in members):
            return None
        if not all(any(member.serves_topic(topic) for member in members) for topic in wanted):
            return None
        reason = f"no broker in {self.members.source} serves all topics of the transaction: {', '.join(sorted(wanted))}"
        return Refused("topic_not_served", reason)

    async def wait_connected(self, timeout: float, has_failed: Callable[[], bool]) -> None:
        """Return when a broker has accepted, all have refused for good, the client has failed, or time is over."""
        with anyio.move_on_after(timeout):
            while not self.sessions() and not has_failed() and not self._is_refused():
                await self.progress.wait()

    def _is_refused(self) -> bool:
        diallers = self.diallers.values()
        return self.members.refusal is not None or bool(diallers and all(one.is_refused for one in diallers))

    async def wait_others(self) -> None:
        """Give each broker some time for its first attempt."""
        with anyio.move_on_after(OTHERS_SECONDS):
            for dialler in list(self.diallers.values()):
                await dialler.tried.wait()

    # --- bindings ------------------------------------------------------------------------------
    async def subscribe(self, binding: Binding) -> None:
        """Add a binding at every broker that is connected and serves its topic, and bring it to the others later.

        One that does not answer is one of the others, if another does.
        """
        self._name({binding.topic})
        able = await self._serving(binding.topic)
        problems = await ask_all(able, subscribing(binding))
        refusals = [error for error in problems.values() if isinstance(error, Refused)]
        if refusals or len(problems) == len(able):
            raise [*refusals, *problems.values()][0]
        for broker in able:
            if (error := problems.get(broker)) is None:
                broker.brought[key_of(binding)] = binding
            else:
                logger.warning("%s did not confirm %s, and is told again: %s", broker.name, binding, error)
        self._greeting.remember(binding)
        for dialler in self.diallers.values():
            dialler.bindings_changed.set()

    async def unsubscribe(self, binding: Binding) -> None:
        """Remove a binding at every broker that is connected, and bring it to none any more."""
        able = await self._serving(binding.topic)
        self._greeting.forget(binding)
        for broker in able:
            broker.brought.pop(key_of(binding), None)
        for error in (await ask_all(able, unsubscribing(binding))).values():
            raise error

    async def _serving(self, topic: str) -> list[Broker]:
        """Return the connected brokers of a topic, once there is one. Raises `not_connected`."""
        if not self.members.has_topics:
            self.connected_sessions()
        with anyio.move_on_after(self._shared.timeout):
            while not (able := [one for one in self.all if one.session is not None and one.serves_topic(topic)]):  # noqa: ASYNC110 see the constant
                await anyio.sleep(WAIT_POLL_SECONDS)
            return able
        raise self.not_connected((topic,))
