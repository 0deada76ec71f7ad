"""Who of several brokers takes the next messages.

Theory of operation. The one with the fewest unanswered messages does, up to where all would have as many.
None has more than its share of the client's window: a broker that stands still keeps that, and the others
go on. One that has not answered for long gets nothing new while another can, nor one that has just refused
something for a while: it answers fast, so it would get nearly all. What is sent again goes where it was sent
before, as only that broker knows it again, unless that one is gone or such a one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

from kiteq.limits import UNANSWERED_BYTES_MAX
from kiteq_client.outgoing import Frame, Lane, Outgoing

if TYPE_CHECKING:
    from kiteq_client.broker import Broker

__all__ = ["Spread", "is_behind", "least_loaded", "serving"]

LATE_SECONDS: Final = 1.0
"""Longer than an answer takes while a disk is slow, and shorter than anybody waits for one."""
REFUSED_SECONDS: Final = 1.0
"""A full disk or store is tried again this often: one refusal each time is what it costs."""


class Spread:
    """Gives what waits to the brokers of a client.

    brokers: those of the moment, in a list that changes. by_topic: they serve different topics.
    """

    def __init__(self, brokers: Sequence[Broker], outgoing: Outgoing, *, by_topic: bool) -> None:
        self._brokers = brokers
        self._outgoing = outgoing
        self._by_topic = by_topic
        self._woken: Broker | None = None
        self._declined: set[Broker] = set()

    def take(self, broker: Broker, body_bytes_max: int) -> Frame | None:
        """Return the next frame for a broker, None if it should not or cannot have one."""
        if len(self._brokers) == 1 and not self._by_topic and not self._outgoing.has_givers:
            return self._outgoing.take(body_bytes_max)
        frame = _take(broker, self._brokers, self._outgoing, body_bytes_max)
        if frame is not None:
            self._declined.clear()
            return frame
        # Whoever has been asked is not asked again until something changes: two would wake each other for ever.
        self._declined.add(broker)
        if (other := _next_taker(self._brokers, self._outgoing, but=self._declined)) is not None:
            other.wake()
        return None

    def wake(self) -> None:
        """There may be something to send: wake who should look."""
        self._declined.clear()
        if len(self._brokers) == 1:
            self._brokers[0].wake()
            return
        for broker in self._brokers:
            if broker.preparing.waiting:
                broker.wake()
        # Between being woken and running it is not asked again who is next: that costs 7 µs for each message.
        if self._woken is None or not self._woken.is_woken:
            self._woken = _next_taker(self._brokers, self._outgoing)
            if self._woken is not None:
                self._woken.wake()


def _take(broker: Broker, brokers: Sequence[Broker], outgoing: Outgoing, body_bytes_max: int) -> Frame | None:
    """Return the next frame for one of several brokers, None if it should not or cannot have one."""
    share = _Share(brokers, outgoing)
    for name, lane in list(outgoing.lanes.items()):
        if not lane.count:
            del outgoing.lanes[name]
        elif (most := _allowance(broker, _takers(brokers, lane, share), outgoing, lane)) > 0:
            most_bytes = share.size - broker.unanswered.size
            frame = outgoing.take(body_bytes_max, name, min(most, share.count - broker.load), most_bytes)
            if frame is not None:
                # Topics take turns.
                outgoing.lanes[name] = outgoing.lanes.pop(name)
                outgoing.has_givers = True
                frame.given_to(broker.name)
                broker.turn = outgoing.next_turn()
                return frame
    return None


def _next_taker(brokers: Sequence[Broker], outgoing: Outgoing, but: Container[Broker] = ()) -> Broker | None:
    """Return who should take now what waits, None if nothing waits or nobody can."""
    if outgoing.has_room:
        share = _Share(brokers, outgoing)
        for lane in outgoing.lanes.values():
            if lane.count and (takers := _takers(brokers, lane, share)) and (least := _least(takers)) not in but:
                return least
    return None


def serving(brokers: Iterable[Broker], topics: Iterable[str]) -> list[Broker]:
    """Return the connected brokers that serve all these topics and take new messages."""
    wanted = list(topics)
    return [broker for broker in brokers if broker.takes_messages and all(map(broker.serves_topic, wanted))]


def least_loaded(brokers: Iterable[Broker], topics: Iterable[str]) -> Broker | None:
    """Return the broker with the least to answer that serves all these topics, None if there is none."""
    able = serving(brokers, topics)
    return _least(_answering(able)) if able else None


def is_behind(broker: Broker) -> bool:
    """Return whether what it was not sent yet would better go to another."""
    return not broker.takes_messages or broker.is_late(monotonic() - LATE_SECONDS)


class _Share:
    """How much of the window each broker can have."""

    __slots__ = ("count", "size")

    def __init__(self, brokers: Sequence[Broker], outgoing: Outgoing) -> None:
        able = max(1, sum(one.takes_messages for one in brokers))
        self.count = -(-outgoing.messages_max // able)
        self.size = -(-UNANSWERED_BYTES_MAX // able)


def _least(brokers: Sequence[Broker]) -> Broker:
    """Brokers with as little to answer take turns: a program that sends one by one uses all."""
    return min(brokers, key=lambda broker: (broker.load, broker.turn))


def _takers(brokers: Sequence[Broker], lane: Lane, share: _Share) -> list[Broker]:
    """Return those that can take messages of a lane at once; who is writing asks by itself when it is done."""
    able = _answering([one for one in brokers if one.takes_messages and one.serves_topic(lane.topic)])
    if lane.broker:
        able = [one for one in able if one.name == lane.broker] or able
    return [one for one in able if not one.is_writing and one.load < share.count and one.unanswered.size < share.size]


def _answering(brokers: list[Broker]) -> list[Broker]:
    """Leave out those that are late or have just refused something, unless all are and have."""
    if len(brokers) < 2:
        return brokers
    now = monotonic()
    late, refused = now - LATE_SECONDS, now - REFUSED_SECONDS
    return [one for one in brokers if one.refused_at < refused and not one.is_late(late)] or brokers


def _allowance(broker: Broker, takers: list[Broker], outgoing: Outgoing, lane: Lane) -> int:
    """Return how many messages of a lane bring this broker to what all have on average."""
    if broker not in takers:
        return 0
    waiting = min(lane.count, outgoing.messages_max - outgoing.in_flight)
    total = waiting + sum(one.load for one in takers)
    return -(-total // len(takers)) - broker.load
