"""The checker's rules about transactions: silent about what may happen, and each names what may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.checker import check
from tests.faults.history import (
    Asked,
    DecideInvoked,
    DecideOk,
    DecideRefused,
    FinalTransaction,
    HalfInvoked,
    HalfOk,
    HalfRefused,
    LocalOutcome,
    Opened,
    Waiting,
)
from tests.faults.story import Story


class Tale(Story):
    """A history with transactions."""

    def prepare(self, *messages: str, outcome: str = "ok", transaction: str = "m1", producer: str = "p") -> None:
        messages = messages or ("m1",)
        rows: list[list[object]] = [[one, "t", "x", "d", 100] for one in messages]
        self.events.append(HalfInvoked(self.step(), transaction, producer, "p1", rows))
        if outcome == "ok":
            self.events.append(HalfOk(self.step(), transaction, list(messages)))
        elif outcome != "unknown":
            self.events.append(HalfRefused(self.step(), transaction, list(messages), outcome))

    def decide(self, decision: str, outcome: str = "ok", *, transaction: str = "m1", producer: str = "p") -> None:
        self.calls += 1
        call = str(self.calls)
        self.events.append(DecideInvoked(self.step(), call, transaction, producer, decision))
        if outcome == "ok":
            self.events.append(DecideOk(self.step(), call))
        elif outcome != "unknown":
            self.events.append(DecideRefused(self.step(), call, outcome))

    def arrive(self, *messages: str, group: str = "a", settle: bool = True) -> None:
        self.open(connection := f"{group}{self.calls}", group)
        for tag, message in enumerate(messages or ("m1",), 1):
            self.deliver(message, on=connection, tag=tag, group=group)
            if settle:
                self.settle(on=connection, tag=tag)

    def local(self, committed: bool) -> None:
        self.events.append(LocalOutcome(self.step(), "m1", committed))

    def listed(self, state: str = "open") -> None:
        self.events.append(FinalTransaction(self.step(), "m1", state))


def committed_and_delivered() -> Tale:
    tale = Tale()
    tale.prepare("m1", "m2")
    tale.decide("commit")
    tale.arrive("m1", "m2")
    tale.local(True)
    tale.finish()
    return tale


def rolled_back_and_gone() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("rollback")
    tale.decide("commit", "transaction_conflict")
    tale.local(False)
    tale.finish()
    return tale


def commit_without_an_answer_that_happened() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("commit", "unknown")
    tale.kill()
    tale.arrive()
    tale.finish()
    return tale


def commit_without_an_answer_that_did_not_happen_yet() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("commit", "unknown")
    tale.kill()
    tale.finish()
    tale.listed()
    return tale


def prepared_without_an_answer_and_unknown() -> Tale:
    tale = Tale()
    tale.prepare(outcome="unknown")
    tale.kill()
    tale.decide("rollback", "unknown_transaction")
    tale.finish()
    return tale


def added_without_an_answer_and_not_delivered() -> Tale:
    tale = Tale()
    tale.prepare("m1")
    tale.prepare("m2", outcome="unknown")
    tale.kill()
    tale.decide("commit")
    tale.arrive("m1")
    tale.local(True)
    tale.finish()
    return tale


def added_and_refused() -> Tale:
    tale = Tale()
    tale.prepare("m1")
    tale.prepare("m2", outcome="store_full")
    tale.decide("commit")
    tale.arrive("m1")
    tale.finish()
    return tale


def asked_and_parked_after_enough() -> Tale:
    tale = Tale()
    tale.prepare()
    for _ in range(15):
        tale.events.append(Asked(tale.step(), "p1", "p", "m1"))
        tale.decide("unknown")
    tale.finish()
    tale.listed("parked")
    return tale


def not_counted_while_undecided() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.events.append(Waiting(tale.step(), "a", "t", 0))
    tale.decide("commit")
    tale.events.append(Waiting(tale.step(), "a", "t", 1))
    tale.arrive()
    tale.finish()
    return tale


def delivered_before_the_commit() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.arrive()
    tale.decide("commit")
    tale.finish()
    return tale


def counted_before_the_commit() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.events.append(Waiting(tale.step(), "a", "t", 1))
    return tale


def dead_before_the_commit() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.finish(dead=1)
    tale.dead(attempts=100)
    tale.listed()
    return tale


def rolled_back_and_delivered() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("rollback")
    tale.arrive()
    tale.finish()
    return tale


def committed_by_an_old_program_and_rolled_back_locally() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("commit", "unknown")
    tale.arrive()
    tale.local(False)
    tale.finish()
    return tale


def commit_taken_after_a_rollback() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("rollback")
    tale.decide("commit")
    return tale


def both_taken_at_once() -> Tale:
    tale = Tale()
    tale.prepare()
    commit = DecideInvoked(tale.step(), "1", "m1", "p", "commit")
    rollback = DecideInvoked(tale.step(), "2", "m1", "p", "rollback")
    tale.events += [commit, rollback, DecideOk(tale.step(), "1"), DecideOk(tale.step(), "2")]
    return tale


def refused_without_an_opposite() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("commit", "transaction_conflict")
    return tale


def decision_forgotten() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("rollback")
    tale.decide("rollback", "unknown_transaction")
    return tale


def committed_and_not_delivered() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("commit")
    tale.kill()
    tale.finish()
    return tale


def in_the_database_and_not_delivered() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.local(True)
    tale.finish()
    return tale


def transaction_forgotten() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.kill()
    tale.decide("commit", "unknown_transaction")
    return tale


def dropped_undecided() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.finish()
    return tale


def another_group_asked() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.events.append(Asked(tale.step(), "q1", "q", "m1"))
    return tale


def a_client_of_other_topics_asked() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.events.append(Opened(tale.step(), "p2", "p", ["u"]))
    tale.events.append(Asked(tale.step(), "p2", "p", "m1"))
    return tale


def another_group_decides() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("rollback", producer="q")
    return tale


def parked_too_early() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.decide("unknown")
    tale.finish()
    tale.listed("parked")
    return tale


def open_at_the_end_though_somebody_knows() -> Tale:
    tale = Tale()
    tale.prepare()
    tale.local(False)
    tale.finish()
    tale.listed()
    return tale


def one_message_of_two_delivered() -> Tale:
    tale = Tale()
    tale.prepare("m1", "m2")
    tale.decide("commit", "unknown")
    tale.arrive("m1")
    tale.finish()
    return tale


def delivered_to_one_of_two_groups() -> Tale:
    tale = Tale("a", "b")
    tale.prepare()
    tale.decide("commit", "unknown")
    tale.arrive()
    tale.finish()
    return tale


GOOD: list[Callable[[], Tale]] = [
    committed_and_delivered,
    rolled_back_and_gone,
    commit_without_an_answer_that_happened,
    commit_without_an_answer_that_did_not_happen_yet,
    prepared_without_an_answer_and_unknown,
    added_without_an_answer_and_not_delivered,
    added_and_refused,
    asked_and_parked_after_enough,
    not_counted_while_undecided,
]

BAD: list[tuple[str, Callable[[], Tale]]] = [
    ("I3", delivered_before_the_commit),
    ("I3", counted_before_the_commit),
    ("I3", dead_before_the_commit),
    ("I4", rolled_back_and_delivered),
    ("I4", committed_by_an_old_program_and_rolled_back_locally),
    ("I4", commit_taken_after_a_rollback),
    ("I5", both_taken_at_once),
    ("I5", refused_without_an_opposite),
    ("I5", decision_forgotten),
    ("I6", committed_and_not_delivered),
    ("I6", in_the_database_and_not_delivered),
    ("I7", transaction_forgotten),
    ("I7", dropped_undecided),
    ("I7", another_group_asked),
    ("I7", a_client_of_other_topics_asked),
    ("I7", another_group_decides),
    ("I7", parked_too_early),
    ("I7", open_at_the_end_though_somebody_knows),
    ("I8", one_message_of_two_delivered),
    ("I8", delivered_to_one_of_two_groups),
]


@pytest.mark.parametrize("told", GOOD, ids=lambda told: told.__name__)
def test_nothing_is_said_about_what_may_happen(told: Callable[[], Tale]) -> None:
    assert [str(violation) for violation in check(told().events)] == []


@pytest.mark.parametrize(("invariant", "told"), BAD, ids=lambda value: value if type(value) is str else value.__name__)
def test_what_may_not_happen_is_named(invariant: str, told: Callable[[], Tale]) -> None:
    assert invariant in {violation.invariant for violation in check(told().events)}


def test_what_comes_too_early_is_named() -> None:
    story = Story()
    story.publish()
    story.events[-2] = story.events[-2]._replace(delay=1.0)  # type: ignore[call-arg]
    story.open()
    story.deliver()
    assert {violation.invariant for violation in check(story.events)} == {"I20"}
