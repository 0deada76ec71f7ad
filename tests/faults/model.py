"""What a history says happened, per message and group: the facts that the rules of the checker judge."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tests.faults.history import (
    Asked,
    Bound,
    BrokerStopped,
    Corrupted,
    DecideInvoked,
    DecideOk,
    DecideRefused,
    Delivered,
    Drained,
    Ended,
    Event,
    Extended,
    FinalDead,
    FinalGroup,
    FinalTransaction,
    HalfInvoked,
    HalfOk,
    HalfRefused,
    LocalOutcome,
    Opened,
    PublishInvoked,
    PublishOk,
    PublishRefused,
    Run,
    SettleOk,
    Settling,
    Stalled,
    Waiting,
)

__all__ = ["Call", "Connection", "Decision", "Delivery", "Model", "Transaction", "Violation", "build"]

DIRECT, REGEX, FANOUT = 0, 1, 2
NOTICE_SECONDS: Final = 1.0
"""How much later than the broker a client may notice that the broker ended its connection."""
STALL_AFTERMATH: Final = 2.0
"""A stalled line is silent for as long again, and a little more: TCP doubles its waits."""


class Violation(NamedTuple):
    """One broken promise."""

    invariant: str
    message: str
    """The id in hex; empty when it is about a group as a whole."""
    group: str
    text: str

    def __str__(self) -> str:
        about = " ".join(part for part in (self.message, self.group and f"group {self.group}") if part)
        return f"{self.invariant} {about}: {self.text}"


@dataclass(slots=True)
class Call:
    """One sending of a message. outcome: "ok", "duplicate", "refused" or "unknown".

    transactional: it became deliverable, or not, by a decision; its times are those of the commit.
    """

    invoked: PublishInvoked
    outcome: str = "unknown"
    at: float = float("inf")
    groups: int | None = None
    durable: bool = False
    transactional: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the producer was told that the message is there."""
        return self.outcome in {"ok", "duplicate"}


@dataclass(slots=True)
class Decision:
    """One request to decide a transaction. outcome: "ok", "unknown" or the code of a refusal."""

    invoked: DecideInvoked
    outcome: str = "unknown"
    at: float = float("inf")


@dataclass(slots=True)
class Transaction:
    """Half messages that share one fate.

    messages: by id; refused: those that the broker did not take. connections: that began it; more than one when it
    was prepared again without an answer.
    """

    id: str
    producer: str
    invoked_at: float
    connections: set[str] = field(default_factory=set)
    prepared_at: float = float("inf")
    messages: dict[str, list[object]] = field(default_factory=dict)
    durable: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    decisions: list[Decision] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    local: bool | None = None
    """What the producer's database says, if that was noted."""
    state: str = ""
    """Of the broker's list of undecided transactions at the end."""

    def tried(self, decision: str) -> list[Decision]:
        """The requests for one decision."""
        return [one for one in self.decisions if one.invoked.decision == decision]

    def confirmed(self, decision: str) -> Decision | None:
        """The first request for a decision that the broker confirmed."""
        return next((one for one in self.tried(decision) if one.outcome == "ok"), None)

    @property
    def topics(self) -> set[str]:
        """Of the messages that are known to belong to it."""
        return {str(message[1]) for one, message in self.messages.items() if one in self.durable}


@dataclass(slots=True)
class Connection:
    """One connection. life: how many times the broker had ended before it was opened."""

    group: str
    opened_at: float
    life: int
    topics: list[str] | None = None
    ended_at: float = float("inf")
    how: str = ""


@dataclass(slots=True)
class Delivery:
    """One arrival of a message and what became of it. settling: "ack", "failed", ... once sent."""

    event: Delivered
    life: int
    held_until: float
    settling: str = ""
    settling_at: float = float("inf")
    confirmed_at: float = float("inf")
    stale: bool = False
    stalled: bool = False
    """Its arrival, or the answer to it, may have been on the way for any time."""

    @property
    def confirmed(self) -> bool:
        """Whether the broker confirmed that the settlement took effect."""
        return self.confirmed_at < float("inf") and not self.stale


@dataclass(slots=True)
class Model:
    """Everything the rules look at."""

    ack_deadline: float = 60.0
    resends: bool = False
    check_limit: int = 15
    stops: list[BrokerStopped] = field(default_factory=list)
    stalls: list[Stalled] = field(default_factory=list)
    connections: dict[str, Connection] = field(default_factory=dict)
    bounds: dict[str, list[Bound]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    deliveries: dict[tuple[str, str], list[Delivery]] = field(default_factory=lambda: defaultdict(list))
    """By (group, message id), in the order in which the broker sent them."""
    transactions: dict[str, Transaction] = field(default_factory=dict)
    transaction_of: dict[str, Transaction] = field(default_factory=dict)
    """By message id."""
    waiting: list[Waiting] = field(default_factory=list)
    corrupted: set[str] = field(default_factory=set)
    drained: Drained | None = None
    groups: dict[str, list[FinalGroup]] = field(default_factory=lambda: defaultdict(list))
    dead: dict[tuple[str, str], list[FinalDead]] = field(default_factory=lambda: defaultdict(list))

    def matching(self, group: str, topic: str, message_type: str, *, sure_at: float | None) -> bool:
        """Whether a group may have been bound to a kind of message; with `sure_at`, was so durably at that time."""
        for bound in self.bounds.get(group, ()):
            if sure_at is not None and (not bound.confirmed or bound.at > sure_at):
                continue
            for binding_topic, kind, pattern, persistent in bound.bindings:
                if binding_topic != topic or (sure_at is not None and not persistent):
                    continue
                if kind == FANOUT or (kind == DIRECT and pattern == message_type):
                    return True
                if kind == REGEX and re.fullmatch(str(pattern), message_type):
                    return True
        return False

    def owed_groups(self, message: str) -> list[str]:
        """The groups that must get an accepted message: bound durably before it was first sent.

        Bytes that a test damaged on the disk are owed to nobody; they must not arrive either.
        """
        calls = self.calls[message]
        if message in self.corrupted or not any(call.accepted and call.durable for call in calls):
            return []
        first = calls[0].invoked
        return [
            group for group in self.bounds if self.matching(group, first.topic, first.message_type, sure_at=first.at)
        ]

    def possible_groups(self, message: str) -> list[str]:
        """The groups that may get a message: it was not refused each time, and they asked for such ones."""
        calls = self.calls.get(message, [])
        if all(call.outcome == "refused" for call in calls):
            return []
        first = calls[0].invoked
        return [group for group in self.bounds if self.matching(group, first.topic, first.message_type, sure_at=None)]

    def noticed_by_broker(self, connection: Connection) -> float:
        """When the broker may first have known of the end of a connection."""
        noticed = connection.ended_at - (NOTICE_SECONDS if connection.how == "lost" else 0.0)
        return min([noticed, *(stall.began for stall in self.stalls_in(connection.ended_at, connection.ended_at))])

    def stalls_in(self, begin: float, end: float) -> Iterator[Stalled]:
        """Yield the stalls that may have been felt in a span of time."""
        for stall in self.stalls:
            if stall.began <= end and begin <= stall.began + STALL_AFTERMATH * (stall.at - stall.began) + 1.0:
                yield stall

    def ended_with_broker(self, connection: Connection) -> bool:
        """Whether a connection was lost because the broker stopped or was killed."""
        lost, life = connection.how == "lost", connection.life
        return lost and life < len(self.stops) and connection.ended_at >= self.stops[life].began


class _Builder:
    """Folds events into a model."""

    def __init__(self, events: list[Event]) -> None:
        self.model = Model()
        self.model.stops = [event for event in events if isinstance(event, BrokerStopped)]
        self.model.stalls = [event for event in events if isinstance(event, Stalled)]
        self._stopped_at = [stop.at for stop in self.model.stops]
        self._calls: dict[str, Call] = {}
        self._decisions: dict[str, Decision] = {}
        self._tags: dict[tuple[str, int], Delivery] = {}

    def fold(self, event: Event) -> None:
        model = self.model
        match event:
            case Run():
                model.ack_deadline, model.resends = event.ack_deadline, event.resends
                model.check_limit = event.check_limit
            case Bound():
                if not any(event[2:] == known[2:] for known in model.bounds[event.group]):
                    model.bounds[event.group].append(event)
            case Opened():
                life = bisect_left(self._stopped_at, event.at)
                model.connections[event.connection] = Connection(event.group, event.at, life, event.topics)
            case Ended():
                connection = model.connections[event.connection]
                connection.ended_at, connection.how = event.at, event.how
            case PublishInvoked():
                self._calls[event.call] = call = Call(event)
                model.calls[event.id].append(call)
            case PublishOk():
                call = self._calls[event.call]
                call.outcome, call.at = "duplicate" if event.duplicate else "ok", event.at
                call.groups, call.durable = event.groups, event.durable
            case PublishRefused():
                call = self._calls[event.call]
                call.outcome, call.at = "refused", event.at
            case Corrupted():
                model.corrupted.add(event.id)
            case Drained():
                model.drained = event
            case FinalGroup():
                model.groups[event.group].append(event)
            case FinalDead():
                model.dead[event.group, event.id].append(event)
            case _:
                self._fold_delivery(event)
                self._fold_transaction(event)

    def _fold_transaction(self, event: Event) -> None:
        model = self.model
        match event:
            case HalfInvoked():
                transaction = model.transactions.setdefault(
                    event.transaction, Transaction(event.transaction, event.producer, event.at)
                )
                transaction.connections.add(event.connection)
                for message in event.messages:
                    transaction.messages[str(message[0])] = message
                    model.transaction_of[str(message[0])] = transaction
            case HalfOk():
                transaction = model.transactions[event.transaction]
                transaction.prepared_at = min(transaction.prepared_at, event.at)
                transaction.durable.update(event.messages)
            case HalfRefused():
                model.transactions[event.transaction].refused.update(event.messages)
            case DecideInvoked():
                self._decisions[event.call] = decision = Decision(event)
                if (decided := model.transactions.get(event.transaction)) is not None:
                    decided.decisions.append(decision)
            case DecideOk():
                self._decisions[event.call].outcome = "ok"
                self._decisions[event.call].at = event.at
            case DecideRefused():
                self._decisions[event.call].outcome = event.code
                self._decisions[event.call].at = event.at
            case Asked():
                if (asked := model.transactions.get(event.transaction)) is not None:
                    asked.asked.append(event)
            case LocalOutcome():
                model.transactions[event.transaction].local = event.committed
            case FinalTransaction():
                if (listed := model.transactions.get(event.transaction)) is not None:
                    listed.state = event.state
            case Waiting():
                model.waiting.append(event)
            case _:
                pass

    def _call_of(self, transaction: Transaction, message: list[object]) -> Call:
        """Return a transactional message as a message that was sent when it was committed."""
        identity, topic, message_type, digest, deliver_limit = message
        tried, done = transaction.tried("commit"), transaction.confirmed("commit")
        at = tried[0].invoked.at if tried else transaction.invoked_at
        producer = transaction.producer
        invoked = PublishInvoked(
            at, "", producer, str(identity), str(topic), str(message_type), str(digest), int(str(deliver_limit))
        )
        call = Call(invoked, durable=True, transactional=True)
        taken = identity in transaction.durable and identity not in transaction.refused
        if taken and (done is not None or transaction.local):
            call.outcome, call.at = "ok", at if done is None else done.at
        elif not tried or transaction.confirmed("rollback") is not None or identity in transaction.refused:
            call.outcome = "refused"
        return call

    def _fold_delivery(self, event: Event) -> None:
        match event:
            case Delivered():
                life = self.model.connections[event.connection].life
                delivery = Delivery(event, life, event.at + self.model.ack_deadline)
                self._tags[event.connection, event.tag] = delivery
                self.model.deliveries[event.group, event.id].append(delivery)
            case Extended():
                self._tags[event.connection, event.tag].held_until = event.at + self.model.ack_deadline
            case Settling():
                delivery = self._tags[event.connection, event.tag]
                delivery.settling, delivery.settling_at = event.how, event.at
            case SettleOk():
                delivery = self._tags[event.connection, event.tag]
                delivery.confirmed_at, delivery.stale = event.at, event.stale
            case _:
                pass

    def finish(self) -> Model:
        # What was read from a socket after the end of its broker had been sent before: lives come first.
        for deliveries in self.model.deliveries.values():
            deliveries.sort(key=lambda delivery: (delivery.life, delivery.event.at))
            for delivery in deliveries if self.model.stalls else ():
                answered = min(delivery.confirmed_at, self.model.connections[delivery.event.connection].ended_at)
                delivery.stalled = any(self.model.stalls_in(delivery.event.at, answered))
        for transaction in self.model.transactions.values():
            for message in transaction.messages.values():
                self.model.calls[str(message[0])].append(self._call_of(transaction, message))
        return self.model


def build(events: Iterable[Event]) -> Model:
    """Return the model of events that are in the order of their times."""
    ordered = list(events)
    builder = _Builder(ordered)
    for event in ordered:
        builder.fold(event)
    return builder.finish()
