"""What the judge of several brokers says of runs that are changed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.history import (
    Bound,
    BrokerStarted,
    DecideInvoked,
    DecideOk,
    Delivered,
    Drained,
    Event,
    FinalGroup,
    HalfInvoked,
    HalfOk,
    History,
    LocalOutcome,
    Opened,
    PublishInvoked,
    PublishOk,
    PublishUnknown,
    Run,
    SettleOk,
    Settling,
)
from tests.faults.several import AUDIT, Repeated, count_repeated, judge

FANOUT: list[list[object]] = [["t", 2, "", True]]


class Told:
    """A run of two brokers, told a step at a time; `books` is a group of programs."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls = 0
        self.tags = 0
        self.programs: list[Event] = [Run(self.now, 10.0, True)]
        self.brokers: dict[str, list[Event]] = {name: [BrokerStarted(self.now, name)] for name in ("one", "two")}
        self.note(Bound(self.step(), "books", FANOUT, True), Opened(self.step(), "books-1", "books"))
        for name, events in self.brokers.items():
            events.extend((Bound(self.step(), AUDIT, FANOUT, True), Opened(self.step(), f"audit-{name}", AUDIT)))

    def step(self) -> float:
        self.now += 0.1
        return self.now

    def note(self, *events: Event) -> None:
        self.programs += events

    def publish(self, message: str, *brokers: str) -> None:
        """Send a message to brokers one after the other; "" is one that does not answer."""
        for broker in brokers:
            self.calls += 1
            call = str(self.calls)
            self.note(PublishInvoked(self.step(), call, "shop", message, "t", "x", "d", 100))
            self.note(
                PublishOk(self.step(), call, 2, False, True, broker) if broker else PublishUnknown(self.step(), call)
            )

    def transact(self, message: str, broker: str, decision: str) -> None:
        self.note(HalfInvoked(self.step(), message, "bank", "", [[message, "t", "x", "d", 100]]))
        self.note(HalfOk(self.step(), message, [message], broker))
        self.calls += 1
        call = str(self.calls)
        self.note(DecideInvoked(self.step(), call, message, "bank", decision), DecideOk(self.step(), call))
        self.note(LocalOutcome(self.step(), message, decision == "commit"))

    def books(self, message: str, digest: str = "d") -> None:
        self.tags += 1
        self.note(Delivered(self.step(), "books-1", "books", self.tags, message, 1, digest))
        self.note(Settling(self.step(), "books-1", self.tags, "ack"))

    def audit(self, broker: str, message: str, *, confirmed: bool = True) -> None:
        self.tags += 1
        events, connection = self.brokers[broker], f"audit-{broker}"
        events.append(Delivered(self.step(), connection, AUDIT, self.tags, message, 1, "d"))
        events.append(Settling(self.step(), connection, self.tags, "ack"))
        if confirmed:
            events.append(SettleOk(self.step(), connection, self.tags, False))

    def arrive(self, message: str, broker: str) -> None:
        self.audit(broker, message)
        self.books(message)

    def finish(self, *, pending: int = 0) -> None:
        for events in self.brokers.values():
            events.append(Drained(self.step(), pending == 0))
            for group in ("books", AUDIT):
                events.append(FinalGroup(self.step(), group, "t", pending if group == "books" else 0, 0, 0, 0))

    def written(self, folder: Path) -> tuple[list[Path], list[list[Path]]]:
        paths = [folder / "programs", *(folder / name for name in self.brokers)]
        for path, events in zip(paths, (self.programs, *self.brokers.values()), strict=True):
            with History(path) as history:
                history.write(*events)
        return paths[:1], [[path] for path in paths[1:]]


def all_is_well(told: Told) -> None:
    told.publish("m1", "one")
    told.arrive("m1", "one")
    told.publish("m2", "two")
    told.arrive("m2", "two")
    told.transact("m3", "one", "commit")
    told.arrive("m3", "one")
    told.transact("m4", "two", "rollback")


def without_an_answer_and_then_sent_to_another(told: Told) -> None:
    told.publish("m1", "", "two")
    told.arrive("m1", "two")


def without_an_answer_and_at_both(told: Told) -> None:
    told.publish("m1", "", "two")
    told.arrive("m1", "two")
    told.arrive("m1", "one")


@pytest.mark.parametrize(
    "story", [all_is_well, without_an_answer_and_then_sent_to_another, without_an_answer_and_at_both]
)
def test_what_may_happen_is_accepted(tmp_path: Path, story: Callable[[Told], None]) -> None:
    told = Told()
    story(told)
    told.finish()
    assert judge(*told.written(tmp_path)) == []


def lost_on_the_way_to_a_group(told: Told) -> None:
    told.publish("m1", "one")
    told.audit("one", "m1")


def lost_on_the_way_to_the_auditor(told: Told) -> None:
    told.publish("m1", "one")
    told.books("m1")


def delivered_by_a_broker_that_never_had_it(told: Told) -> None:
    told.publish("m1", "one")
    told.arrive("m1", "one")
    told.audit("two", "m1")


def nobody_sent_it(told: Told) -> None:
    told.books("ghost")


def other_bytes(told: Told) -> None:
    told.publish("m1", "one")
    told.audit("one", "m1")
    told.books("m1", digest="e")


def rolled_back_and_delivered(told: Told) -> None:
    told.transact("m1", "one", "rollback")
    told.books("m1")


def committed_and_lost(told: Told) -> None:
    told.transact("m1", "one", "commit")


def delivered_before_it_was_committed(told: Told) -> None:
    told.note(HalfInvoked(told.step(), "m1", "bank", "", [["m1", "t", "x", "d", 100]]))
    told.books("m1")
    told.transact("m1", "one", "commit")
    told.audit("one", "m1")


def again_after_a_confirmed_ack(told: Told) -> None:
    told.publish("m1", "one")
    told.arrive("m1", "one")
    told.audit("one", "m1")


def held_twice_at_once(told: Told) -> None:
    told.publish("m1", "one")
    told.books("m1")
    told.brokers["one"].append(Opened(told.step(), "audit-other", AUDIT))
    for connection in ("audit-one", "audit-other"):
        told.brokers["one"].append(Delivered(told.step(), connection, AUDIT, 7, "m1", 1, "d"))
    for connection in ("audit-one", "audit-other"):
        told.brokers["one"].append(Settling(told.step(), connection, 7, "ack"))


def stored_twice_by_one_broker(told: Told) -> None:
    told.publish("m1", "one", "one")
    told.arrive("m1", "one")


def out_of_order(told: Told) -> None:
    told.publish("m1", "one")
    told.publish("m2", "one")
    told.arrive("m2", "one")
    told.arrive("m1", "one")


def something_is_left(told: Told) -> None:
    told.publish("m1", "one")
    told.arrive("m1", "one")
    told.finish(pending=3)


@pytest.mark.parametrize(
    ("story", "invariant"),
    [
        (lost_on_the_way_to_a_group, "I1"),
        (lost_on_the_way_to_the_auditor, "I1"),
        (delivered_by_a_broker_that_never_had_it, "I2"),
        (nobody_sent_it, "I2"),
        (other_bytes, "I2"),
        (rolled_back_and_delivered, "I4"),
        (committed_and_lost, "I6"),
        (delivered_before_it_was_committed, "I3"),
        (again_after_a_confirmed_ack, "I9"),
        (held_twice_at_once, "I11"),
        (out_of_order, "I12"),
        (stored_twice_by_one_broker, "I14"),
        (something_is_left, "I22"),
    ],
)
def test_what_may_not_happen_is_named(tmp_path: Path, story: Callable[[Told], None], invariant: str) -> None:
    told = Told()
    story(told)
    told.finish()
    assert invariant in {violation.invariant for violation in judge(*told.written(tmp_path))}


def test_what_arrives_again_is_counted(tmp_path: Path) -> None:
    told = Told()
    told.publish("m1", "one")
    told.publish("m2", "", "two")
    for message in ("m1", "m1", "m2", "m2", "m2"):
        told.books(message)
    told.note(
        Delivered(told.step(), "books-1", "books", 99, "m1", 2, "d"), Settling(told.step(), "books-1", 99, "failed")
    )
    programs, _ = told.written(tmp_path)
    assert count_repeated(programs) == [Repeated("books", messages=2, again=3, sent_again=2)]
