"""Judges a history of several brokers that are bound to the same groups.

The history is that of programs, which do not see which broker a message comes from, and beside it one for each
broker: its starts and ends, what it says at the end, and what an *auditor* saw, a member of the group `AUDIT`
that speaks the wire protocol to this broker alone.

- Taken together (`RULES_ACROSS_BROKERS`): whatever broker accepted a message, every bound group gets it; nothing
  uncommitted, rolled back or unknown arrives; a transaction has one outcome; at the end nothing is left.
- Each broker by itself, as its auditor saw it: all the rules of one broker, and the order of first deliveries.

A message whose outcome was unknown may be at any broker. When its program then sends it again, two brokers may
have it, and it arrives twice: `Repeated` counts what arrived more than once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.faults.checker import RULES, RULES_ACROSS_BROKERS, Violation, check
from tests.faults.history import (
    Bound,
    BrokerStarted,
    DecideInvoked,
    Delivered,
    Drained,
    Event,
    FinalDead,
    FinalGroup,
    HalfInvoked,
    HalfOk,
    HalfRefused,
    LocalOutcome,
    PublishInvoked,
    PublishOk,
    PublishRefused,
    PublishUnknown,
    Run,
    Settling,
    read_histories,
)
from tests.faults.model import Call, Model

__all__ = ["AUDIT", "Repeated", "count_repeated", "in_order", "judge", "of_broker"]

AUDIT: Final = "audit"


class Repeated(NamedTuple):
    """What a group got more than once.

    again: arrivals behind the first, but for those that follow a failure of its own. sent_again: how many
    of them are of messages that their program sent more than once.
    """

    group: str
    messages: int
    again: int
    sent_again: int


def judge(programs: Sequence[Path], brokers: Sequence[Sequence[Path]]) -> list[Violation]:
    """Return all violations in the histories of programs and, some files for each, of brokers."""
    shared = read_histories(programs)
    own = [read_histories(paths) for paths in brokers]
    together = sorted([*shared, *(event for events in own for event in events)], key=lambda event: event.at)
    found = check([event for event in together if not isinstance(event, Drained)] + _end(own), RULES_ACROSS_BROKERS)
    for events in own:
        ids = {event.broker for event in events if isinstance(event, BrokerStarted)}
        assert len(ids) == 1, f"a store keeps the id of its broker, but this one had {ids}"
        broker = ids.pop()
        judged = check(of_broker(shared, events, broker), (*RULES, in_order))
        found += [one._replace(text=f"broker {broker}: {one.text}") for one in judged]
    return found


def _end(own: Sequence[list[Event]]) -> list[Event]:
    """Return the end of the run, if all brokers came to it."""
    ends = [event for events in own for event in events if isinstance(event, Drained)]
    if len(ends) < len(own):
        return []
    return [Drained(max(end.at for end in ends), all(end.complete for end in ends))]


def of_broker(shared: Sequence[Event], own: Sequence[Event], broker: str) -> list[Event]:
    """Return what one broker may know of: what it accepted, what may have reached it, and what its auditor saw."""
    brokers = {event.call: event.broker for event in shared if isinstance(event, PublishOk)}
    homes = {event.transaction: event.broker for event in shared if isinstance(event, HalfOk)}
    decisions = {event.call: event.transaction for event in shared if isinstance(event, DecideInvoked)}

    def concerns(event: Event) -> bool:
        match event:
            case PublishInvoked() | PublishOk() | PublishRefused() | PublishUnknown():
                return brokers.get(event.call, broker) == broker
            case HalfInvoked() | HalfOk() | HalfRefused() | DecideInvoked() | LocalOutcome():
                return homes.get(event.transaction, broker) == broker
            case Bound():
                return event.group == AUDIT
            case Run():
                return True
            case _:
                call = getattr(event, "call", None)  # of a decision, answered or refused
                return call in decisions and homes.get(decisions[call], broker) == broker

    theirs = [event for event in own if not isinstance(event, FinalGroup | FinalDead) or event.group == AUDIT]
    # Sorted by time alone: what is equal keeps its place, and a program writes before its auditors.
    return sorted([*filter(concerns, shared), *theirs], key=lambda event: event.at)


def in_order(model: Model) -> Iterator[Violation]:
    """I12: first deliveries on one connection come in the order in which messages became deliverable.

    Judged for messages of one topic of which one was answered before the other was sent. On a connection that
    was opened while a line stood still, what comes back from the one before it may come late.
    """
    first = sorted(
        (deliveries[0] for (group, _), deliveries in model.deliveries.items() if group == AUDIT),
        key=lambda delivery: delivery.event.at,
    )
    answered: dict[tuple[str, str], tuple[float, str]] = {}
    for delivery in reversed(first):
        event = delivery.event
        calls = model.calls.get(event.id, [])
        opened_at = model.connections[event.connection].opened_at
        if event.attempt != 1 or len(calls) != 1 or any(model.stalls_in(opened_at, opened_at)):
            continue
        call: Call = calls[0]
        key = (event.connection, call.invoked.topic)
        at, later = answered.get(key, (float("inf"), ""))
        if at < call.invoked.at:
            text = f"delivered before {later}, which had been answered before this one was sent"
            yield Violation("I12", event.id, AUDIT, text)
        if call.at < at and _was_answered(model, call):
            answered[key] = call.at, event.id


def _was_answered(model: Model, call: Call) -> bool:
    if call.transactional:
        return model.transaction_of[call.invoked.id].confirmed("commit") is not None
    return call.outcome == "ok"


def count_repeated(programs: Sequence[Path]) -> list[Repeated]:
    """Return for each group of the programs how much arrived more than once."""
    sendings = Counter[str]()
    arrivals: dict[str, Counter[str]] = {}
    failed = Counter[tuple[str, str]]()
    held: dict[tuple[str, int], Delivered] = {}
    for event in read_histories(programs):
        match event:
            case PublishInvoked():
                sendings[event.id] += 1
            case Delivered():
                arrivals.setdefault(event.group, Counter())[event.id] += 1
                held[event.connection, event.tag] = event
            case Settling(how="failed"):
                delivery = held[event.connection, event.tag]
                failed[delivery.group, delivery.id] += 1
            case _:
                pass
    found: list[Repeated] = []
    for group, counted in sorted(arrivals.items()):
        again = {one: number - 1 - failed[group, one] for one, number in counted.items()}
        sent_again = sum(max(0, number) for one, number in again.items() if sendings[one] > 1)
        found.append(Repeated(group, len(counted), sum(max(0, number) for number in again.values()), sent_again))
    return found
