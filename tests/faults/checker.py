"""Judges a history: which promises of the broker does it contradict?

`check(events)` is a pure function; each `Violation` names the invariant that is broken. An operation
of unknown outcome may have happened or not, and both must be consistent with what was seen later.

    I1   an accepted message reaches every group that was bound before it was sent
    I2   what arrives was published, byte for byte, and for a group that asked for such messages
    I3 to I8  what transactions promise: see `transaction_rules`
    I9   after a confirmed ack a message never comes again to that group
    I10  what was not acked comes again, attempts never go back, the limit ends in the dead letters
    I11  a message is with one connection of a group at a time
    I14  the same id sent again within the window is stored once, and the receipt says so
    I20  what is delayed does not come before its time
    I22  at the end, per group, what was accepted is acked, waiting or dead: each exactly one of them

What needs the end of a run (I1, a part of I10, I22) is judged only when the history has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Final

from tests.faults.history import Event
from tests.faults.model import Call, Delivery, Model, Violation, build
from tests.faults.transaction_rules import TRANSACTION_RULES

__all__ = ["RULES", "RULES_ACROSS_BROKERS", "Rule", "Violation", "check"]

DURABLE_ATTEMPT: Final = 4
"""An attempt that follows the third failure: from here the count survives a restart."""
DUPLICATE_WINDOW_SECONDS: Final = 600.0
DEADLINE_SHARE: Final = 0.8
"""Times are taken where messages arrive, a little after the broker's clock started."""


Rule = Callable[[Model], Iterator[Violation]]


def check(events: Iterable[Event], rules: Iterable[Rule] | None = None) -> list[Violation]:
    """Return all violations in a history, whose events are in the order of their times."""
    model = build(events)
    return [violation for rule in rules or RULES for violation in rule(model)]


def _no_loss(model: Model) -> Iterator[Violation]:
    for message, calls in model.calls.items():
        owed = model.owed_groups(message)
        for call in calls:
            if call.groups is not None and call.outcome == "ok" and call.groups < len(owed):
                text = f"the receipt says {call.groups} groups, but {len(owed)} were bound: {', '.join(owed)}"
                yield Violation("I1", message, "", text)
        if model.drained is None:
            continue
        for group in owed:
            if not model.deliveries.get((group, message)) and not model.dead.get((group, message)):
                rule, what = ("I6", "committed") if calls[0].transactional else ("I1", "accepted")
                yield Violation(rule, message, group, f"{what}, the group was bound, and it was never delivered")


def _no_invention(model: Model) -> Iterator[Violation]:
    for (group, message), deliveries in model.deliveries.items():
        calls = model.calls.get(message)
        if not calls:
            yield Violation("I2", message, group, "delivered, but nobody published it")
            continue
        if all(call.outcome == "refused" for call in calls):
            if message not in model.transaction_of:  # of those I3 and I4 say more
                yield Violation("I2", message, group, "delivered, but it was refused")
        elif group not in model.possible_groups(message):
            yield Violation("I2", message, group, "delivered to a group that never asked for such messages")
        accepted = {call.invoked.digest for call in calls if call.outcome != "refused" or call.transactional}
        if wrong := {delivery.event.digest for delivery in deliveries} - accepted:
            yield Violation("I2", message, group, f"delivered with other bytes than were published: {wrong.pop()}")
    for (group, message), rows in model.dead.items():
        calls = model.calls.get(message)
        if not calls:
            yield Violation("I2", message, group, "a dead letter that nobody published")
        elif {(row.topic, row.message_type) for row in rows} != {
            (calls[0].invoked.topic, calls[0].invoked.message_type)
        }:
            yield Violation("I2", message, group, "a dead letter under another topic or type than it was published")


def _no_return_after_ack(model: Model) -> Iterator[Violation]:
    for (group, message), deliveries in model.deliveries.items():
        for position, delivery in enumerate(deliveries):
            if not (delivery.settling == "ack" and delivery.confirmed):
                continue
            later = [other for other in deliveries[position + 1 :] if _sent_after_answer(delivery, other)]
            if later:
                again = later[0].event
                text = (
                    f"acked on {delivery.event.connection} with confirmation, "
                    f"then delivered again on {again.connection} as attempt {again.attempt}"
                )
                yield Violation(_return_rule(model.calls.get(message, [])), message, group, text)
                break


def _sent_after_answer(settled: Delivery, other: Delivery) -> bool:
    if other.life != settled.life:
        return other.life > settled.life
    # A lower attempt was sent before the settled one and merely read late.
    return other.event.at > settled.confirmed_at and other.event.attempt >= settled.event.attempt


def _return_rule(calls: list[Call]) -> str:
    """A second coming of a message that may have been stored twice speaks against the duplicate window."""
    stored = [call for call in calls if call.outcome in {"ok", "unknown"}]
    return "I14" if len(stored) > 1 and any(call.outcome == "ok" for call in stored) else "I9"


def _unacked_comes_again(model: Model) -> Iterator[Violation]:
    for (group, message), deliveries in model.deliveries.items():
        calls = model.calls.get(message)
        if not calls:
            continue
        yield from _attempts_are_monotone(model, group, message, deliveries)
        limit = calls[0].invoked.deliver_limit
        if (highest := max(delivery.event.attempt for delivery in deliveries)) > limit:
            yield Violation("I10", message, group, f"attempt {highest} of a message that has {limit}")
        dead = model.dead.get((group, message), [])
        for delivery, following in pairwise(deliveries):
            if delivery.settling == "rejected" and delivery.confirmed and _sent_after_answer(delivery, following):
                yield Violation("I10", message, group, "rejected with confirmation, then delivered again")
        if model.drained is not None and not dead and message not in model.corrupted:
            last = deliveries[-1]
            acked = any(one.settling == "ack" and one.confirmed for one in deliveries)
            if not acked and (last.settling != "ack" or last.stale):
                text = (
                    f"attempt {last.event.attempt} ended as {last.settling or 'not answered'}; "
                    "it was neither delivered again nor is it a dead letter"
                )
                yield Violation("I10", message, group, text)
        for row in dead:
            rejected = any(one.settling == "rejected" for one in deliveries)
            if row.reason != "expired" and not rejected and row.attempts < limit:
                text = f"a dead letter ({row.reason}) after {row.attempts} of {limit} attempts, not rejected by anybody"
                yield Violation("I10", message, group, text)


def _attempts_are_monotone(model: Model, group: str, message: str, deliveries: list[Delivery]) -> Iterator[Violation]:
    floor = floor_of_life = 1
    life = deliveries[0].life
    failures = 0
    for delivery in deliveries:
        attempt = delivery.event.attempt
        if delivery.life != life:
            life, floor_of_life = delivery.life, floor
        if attempt < floor_of_life:
            yield Violation("I10", message, group, f"attempt {attempt} after at least {floor_of_life}: it went back")
        if attempt > 1 + failures and attempt > (most := 1 + failures + _ended_connections(model, group, delivery)):
            text = f"attempt {attempt}, but at most {most - 1} attempts can have failed"
            yield Violation("I10", message, group, text)
        counted = attempt + (delivery.settling == "failed" and delivery.confirmed)
        floor_of_life = max(floor_of_life, counted)
        if counted >= DURABLE_ATTEMPT:
            floor = max(floor, counted)
        if delivery.settling == "failed" or _held_too_long(model, delivery):
            failures += 1


def _held_too_long(model: Model, delivery: Delivery) -> bool:
    """Whether the ack deadline may have passed before anything else ended a delivery."""
    if delivery.stalled:
        return True
    ends = [delivery.settling_at, model.connections[delivery.event.connection].ended_at]
    ends += [stop.began for stop in model.stops[delivery.life : delivery.life + 1]]
    return min(ends) > delivery.event.at + DEADLINE_SHARE * model.ack_deadline


def _ended_connections(model: Model, group: str, delivery: Delivery) -> int:
    """Return how many connections of the group had ended before a delivery, but with the broker itself."""
    return sum(
        connection.group == group
        and model.noticed_by_broker(connection) < delivery.event.at
        and not model.ended_with_broker(connection)
        for connection in model.connections.values()
    )


def _one_lease(model: Model) -> Iterator[Violation]:
    for (group, message), deliveries in model.deliveries.items():
        for first, second in pairwise(deliveries):
            if first.life != second.life or _released(model, first, second):
                continue
            text = (
                f"delivered on {first.event.connection} and on {second.event.connection} "
                f"{second.event.at - first.event.at:.3f} s later, while the first still held it"
            )
            yield Violation("I11", message, group, text)


def _released(model: Model, delivery: Delivery, following: Delivery) -> bool:
    """Whether a delivery may have been over at the next one: answered, deadline passed, or its connection gone."""
    at = following.event.at
    if delivery.stalled:
        return True
    if delivery.settling == "ack" and delivery.confirmed:
        # It was held until its ack took effect; what comes after that speaks against I9.
        return _sent_after_answer(delivery, following) or following.event.attempt < delivery.event.attempt
    if delivery.settling_at <= at or at >= delivery.held_until - (1 - DEADLINE_SHARE) * model.ack_deadline:
        return True
    if delivery.event.connection == following.event.connection:
        return False
    return model.noticed_by_broker(model.connections[delivery.event.connection]) <= at


def _stored_once(model: Model) -> Iterator[Violation]:
    for message, calls in model.calls.items():
        for call in calls:
            others = [other for other in calls if other is not call and other.invoked.producer == call.invoked.producer]
            if call.outcome == "duplicate":
                before = any(other.outcome != "refused" and other.invoked.at <= call.at for other in others)
                if not before and not model.resends:
                    yield Violation("I14", message, "", "called a duplicate, but it was never sent before")
                continue
            earlier = [other for other in others if other.accepted and _in_window(other, call)]
            if call.outcome != "ok" or not earlier:
                continue
            if any(other.invoked.digest != call.invoked.digest for other in earlier):
                yield Violation("I14", message, "", "another body under an id in the window was accepted")
            elif any(other.outcome == "ok" for other in earlier):
                text = "sent again within the window, and the receipt does not call it a duplicate"
                yield Violation("I14", message, "", text)


def _never_early(model: Model) -> Iterator[Violation]:
    for (group, message), deliveries in model.deliveries.items():
        calls = model.calls.get(message)
        if not calls or not calls[0].invoked.delay:
            continue
        wait = min(delivery.event.at for delivery in deliveries) - calls[0].invoked.at
        if wait < calls[0].invoked.delay:
            yield Violation("I20", message, group, f"came after {wait:.3f} of {calls[0].invoked.delay:g} seconds")


def _in_window(earlier: Call, call: Call) -> bool:
    """Whether `earlier` was sent before `call`, and recently enough for `call` to be a duplicate of it."""
    return earlier.invoked.at < call.invoked.at and call.at - earlier.invoked.at <= DUPLICATE_WINDOW_SECONDS


def _conserved(model: Model) -> Iterator[Violation]:
    if not model.groups and not model.dead:
        return
    owed: dict[str, set[str]] = {group: set() for group in model.bounds}
    possible: dict[str, set[str]] = {group: set() for group in model.bounds}
    for message in model.calls:
        for group in model.owed_groups(message):
            owed[group].add(message)
        for group in model.possible_groups(message):
            possible[group].add(message)
    for group in model.bounds:
        yield from _group_is_conserved(model, group, owed[group], possible[group])


def _group_is_conserved(model: Model, group: str, owed: set[str], possible: set[str]) -> Iterator[Violation]:
    rows = model.groups.get(group, [])
    if not rows and owed:
        yield Violation("I22", "", group, "the broker does not know the group any more")
        return
    dead = {message for (owner, message) in model.dead if owner == group}
    told = sum(row.dead for row in rows)
    listed = sum(len(found) for (owner, _), found in model.dead.items() if owner == group)
    if told != listed:
        yield Violation("I22", "", group, f"the broker counts {told} dead letters and lists {listed}")
    acked: set[str] = set()
    maybe_acked: set[str] = set()
    for (owner, message), deliveries in model.deliveries.items():
        if owner != group:
            continue
        if any(one.settling == "ack" and one.confirmed for one in deliveries):
            acked.add(message)
        elif deliveries[-1].settling == "ack" and not deliveries[-1].stale:
            maybe_acked.add(message)
    for message in sorted(dead):
        if (times := len(model.dead[group, message])) > 1:
            yield Violation("I22", message, group, f"{times} times in the dead letters")
    for message in sorted(acked & dead):
        yield Violation("I22", message, group, "acked with confirmation, and also a dead letter")
    waiting = sum(row.pending + row.in_flight + row.retrying for row in rows)
    least = len(owed - acked - maybe_acked - dead)
    most = len((possible | owed) - acked - dead)
    if not least <= waiting <= most:
        text = (
            f"{waiting} messages wait, but the history leaves {least} to {most} (acked {len(acked)}, dead {len(dead)})"
        )
        yield Violation("I22", "", group, text)


RULES: Final[tuple[Rule, ...]] = (
    _no_loss,
    _no_invention,
    _no_return_after_ack,
    _unacked_comes_again,
    _one_lease,
    _stored_once,
    _never_early,
    _conserved,
    *TRANSACTION_RULES,
)

RULES_ACROSS_BROKERS: Final[tuple[Rule, ...]] = (_no_loss, _no_invention, _never_early, _conserved, *TRANSACTION_RULES)
"""What holds for several brokers taken together; attempts, leases and repeated sends are of one broker each."""
