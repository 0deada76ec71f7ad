"""The checker accepts what may happen and names the invariant of everything that may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.checker import check
from tests.faults.history import (
    Bound,
    BrokerStopped,
    Corrupted,
    Delivered,
    Drained,
    Ended,
    Event,
    Extended,
    FinalDead,
    FinalGroup,
    History,
    Opened,
    PublishInvoked,
    PublishOk,
    PublishRefused,
    PublishUnknown,
    Run,
    SettleOk,
    Settling,
    read_histories,
)

DEADLINE = 10.0


class Story:
    """A history told by hand: every step takes a tenth of a second unless `wait` says more."""

    def __init__(self, *groups: str) -> None:
        self.now = 100.0
        self.events: list[Event] = [Run(self.now, DEADLINE)]
        self.calls = 0
        for group in groups or ("a",):
            self.events.append(Bound(self.step(), group, [["t", 0, "x", True]], True))

    def step(self, seconds: float = 0.1) -> float:
        self.now += seconds
        return self.now

    def publish(
        self,
        message: str = "m1",
        outcome: str = "ok",
        *,
        groups: int | None = None,
        digest: str = "d",
        message_type: str = "x",
        limit: int = 100,
    ) -> None:
        self.calls += 1
        call = str(self.calls)
        self.events.append(PublishInvoked(self.step(), call, "p", message, "t", message_type, digest, limit))
        if outcome == "refused":
            self.events.append(PublishRefused(self.step(), call, "no"))
        elif outcome == "unknown":
            self.events.append(PublishUnknown(self.step(), call))
        else:
            self.events.append(PublishOk(self.step(), call, groups, outcome == "duplicate", True))

    def open(self, connection: str = "a1", group: str = "a") -> None:
        self.events.append(Opened(self.step(), connection, group))

    def end(self, connection: str = "a1", how: str = "dropped") -> None:
        self.events.append(Ended(self.step(), connection, how))

    def deliver(
        self,
        message: str = "m1",
        *,
        on: str = "a1",
        tag: int = 1,
        attempt: int = 1,
        digest: str = "d",
        group: str = "a",
    ) -> None:
        self.events.append(Delivered(self.step(), on, group, tag, message, attempt, digest))

    def settle(
        self, how: str = "ack", *, on: str = "a1", tag: int = 1, confirmed: bool = True, stale: bool = False
    ) -> None:
        self.events.append(Settling(self.step(), on, tag, how))
        if confirmed:
            self.events.append(SettleOk(self.step(), on, tag, stale))

    def kill(self) -> None:
        self.events.append(BrokerStopped(self.step(), self.now, "killed"))

    def finish(self, *, pending: int = 0, dead: int = 0, group: str = "a") -> None:
        self.events.append(Drained(self.step(), pending == 0))
        self.events.append(FinalGroup(self.step(), group, "t", pending, 0, 0, dead))

    def dead(self, message: str = "m1", *, reason: str = "limit", attempts: int = 100, topic: str = "t") -> None:
        self.events.append(FinalDead(self.step(), "a", topic, message, "x", reason, attempts))


def consumed() -> Story:
    story = Story()
    story.publish()
    story.open()
    story.deliver()
    return story


def all_is_well() -> Story:
    story = consumed()
    story.settle()
    story.finish()
    return story


def unknown_publish_that_did_not_happen() -> Story:
    story = Story()
    story.publish(outcome="unknown")
    story.finish()
    return story


def unknown_publish_that_happened_and_was_sent_again() -> Story:
    story = Story()
    story.publish(outcome="unknown")
    story.kill()
    story.publish(outcome="duplicate")
    story.open()
    story.deliver()
    story.settle()
    story.finish()
    return story


def unconfirmed_ack_that_did_not_happen() -> Story:
    story = consumed()
    story.settle(confirmed=False)
    story.kill()
    story.open("a2")
    story.deliver(on="a2")
    story.settle(on="a2")
    story.finish()
    return story


def unconfirmed_ack_that_happened() -> Story:
    story = consumed()
    story.settle(confirmed=False)
    story.kill()
    story.finish()
    return story


def read_late_from_the_socket_of_a_killed_broker() -> Story:
    story = Story()
    story.publish()
    story.open("a1")
    story.kill()
    story.open("a2")
    story.deliver(on="a2")
    story.settle(on="a2")
    story.deliver(on="a1")
    story.finish()
    return story


def failed_three_times_and_dead() -> Story:
    story = Story()
    story.publish(limit=3)
    story.open()
    for attempt in (1, 2, 3):
        story.deliver(tag=attempt, attempt=attempt)
        story.settle("failed", tag=attempt)
    story.finish(dead=1)
    story.dead(attempts=3)
    return story


def early_attempts_forgotten_at_restart() -> Story:
    story = consumed()
    story.settle("failed")
    story.deliver(tag=2, attempt=2)
    story.kill()
    story.open("a2")
    story.deliver(on="a2", attempt=1)
    story.settle(on="a2")
    story.finish()
    return story


def deadline_passed() -> Story:
    story = consumed()
    story.step(DEADLINE)
    story.open("a2")
    story.deliver(on="a2", attempt=2)
    story.settle(on="a1", stale=True)
    story.settle(on="a2")
    story.finish()
    return story


def dropped_connection() -> Story:
    story = consumed()
    story.end("a1", "dropped")
    story.open("a2")
    story.deliver(on="a2", attempt=2)
    story.settle(on="a2")
    story.finish()
    return story


def connection_ended_by_the_broker_noticed_late() -> Story:
    story = consumed()
    story.open("a2")
    story.deliver(on="a2", attempt=2)
    story.end("a1", "lost")
    story.settle(on="a2")
    story.finish()
    return story


def bound_too_late() -> Story:
    story = Story()
    story.publish()
    story.events.append(Bound(story.step(), "late", [["t", 0, "x", True]], True))
    story.open()
    story.deliver()
    story.settle()
    story.finish()
    return story


def still_waiting_and_counted() -> Story:
    story = Story()
    story.publish()
    story.events.append(FinalGroup(story.step(), "a", "t", 1, 0, 0, 0))
    return story


def corrupted_on_the_disk_and_kept_back() -> Story:
    story = Story()
    story.publish()
    story.events.append(Corrupted(story.step(), "m1"))
    story.finish()
    return story


GOOD: list[Callable[[], Story]] = [
    all_is_well,
    unknown_publish_that_did_not_happen,
    unknown_publish_that_happened_and_was_sent_again,
    unconfirmed_ack_that_did_not_happen,
    unconfirmed_ack_that_happened,
    read_late_from_the_socket_of_a_killed_broker,
    failed_three_times_and_dead,
    early_attempts_forgotten_at_restart,
    deadline_passed,
    dropped_connection,
    connection_ended_by_the_broker_noticed_late,
    bound_too_late,
    still_waiting_and_counted,
    corrupted_on_the_disk_and_kept_back,
]


@pytest.mark.parametrize("told", GOOD, ids=lambda told: told.__name__)
def test_nothing_is_said_about_what_may_happen(told: Callable[[], Story]) -> None:
    assert [str(violation) for violation in check(told().events)] == []


def never_delivered() -> Story:
    story = Story()
    story.publish()
    story.finish()
    return story


def delivered_to_one_of_two_groups() -> Story:
    story = Story("a", "b")
    story.publish()
    story.open()
    story.deliver()
    story.settle()
    story.finish()
    story.events.append(FinalGroup(story.step(), "b", "t", 0, 0, 0, 0))
    return story


def receipt_forgets_a_group() -> Story:
    story = Story("a", "b")
    story.publish(groups=1)
    return story


def never_published() -> Story:
    story = Story()
    story.open()
    story.deliver("ghost")
    return story


def other_bytes() -> Story:
    story = Story()
    story.publish()
    story.open()
    story.deliver(digest="e")
    return story


def corrupted_on_the_disk_and_delivered() -> Story:
    story = Story()
    story.publish()
    story.events.append(Corrupted(story.step(), "m1"))
    story.open()
    story.deliver(digest="damaged")
    return story


def another_group() -> Story:
    story = Story("a")
    story.publish(message_type="y")
    story.open()
    story.deliver()
    return story


def refused_and_delivered() -> Story:
    story = Story()
    story.publish(outcome="refused")
    story.open()
    story.deliver()
    return story


def dead_letter_from_nowhere() -> Story:
    story = Story()
    story.finish(dead=1)
    story.dead("ghost")
    return story


def dead_letter_of_another_topic() -> Story:
    story = Story()
    story.publish()
    story.open()
    story.deliver()
    story.settle("rejected")
    story.finish(dead=1)
    story.dead(reason="rejected", topic="u")
    return story


def acked_and_delivered_again() -> Story:
    story = consumed()
    story.settle()
    story.deliver(tag=2)
    return story


def acked_and_delivered_after_restart() -> Story:
    story = consumed()
    story.settle()
    story.kill()
    story.open("a2")
    story.deliver(on="a2")
    return story


def acked_and_delivered_twice_after_an_answered_duplicate() -> Story:
    story = consumed()
    story.settle()
    story.publish(outcome="duplicate")
    story.deliver(tag=2)
    return story


def nacked_and_forgotten() -> Story:
    story = consumed()
    story.settle("failed")
    story.finish()
    return story


def lost_with_its_connection() -> Story:
    story = consumed()
    story.end()
    story.finish()
    return story


def stale_ack_and_forgotten() -> Story:
    story = consumed()
    story.settle(stale=True)
    story.finish()
    return story


def attempts_go_back() -> Story:
    story = consumed()
    story.settle("failed")
    story.deliver(tag=2, attempt=1)
    return story


def durable_attempts_go_back_at_restart() -> Story:
    story = Story()
    story.publish()
    story.open()
    for attempt in (1, 2, 3):
        story.deliver(tag=attempt, attempt=attempt)
        story.settle("failed", tag=attempt)
    story.kill()
    story.open("a2")
    story.deliver(on="a2", attempt=1)
    return story


def attempts_grow_by_restart() -> Story:
    story = consumed()
    story.kill()
    story.end("a1", "lost")
    story.open("a2")
    story.deliver(on="a2", attempt=2)
    return story


def over_the_limit() -> Story:
    story = Story()
    story.publish(limit=1)
    story.open()
    story.deliver()
    story.settle("failed")
    story.deliver(tag=2, attempt=2)
    return story


def dead_too_early() -> Story:
    story = consumed()
    story.settle("failed")
    story.finish(dead=1)
    story.dead(attempts=1)
    return story


def rejected_and_delivered_again() -> Story:
    story = consumed()
    story.settle("rejected")
    story.deliver(tag=2)
    return story


def two_leases() -> Story:
    story = consumed()
    story.open("a2")
    story.deliver(on="a2")
    return story


def two_leases_in_spite_of_an_extension() -> Story:
    story = consumed()
    story.events.append(Extended(story.step(DEADLINE / 2), "a1", 1))
    story.open("a2")
    story.step(DEADLINE / 2)
    story.deliver(on="a2", attempt=2)
    return story


def two_leases_although_the_ack_was_on_its_way() -> Story:
    story = consumed()
    story.settle(confirmed=False)
    story.deliver(tag=2)
    story.events.append(SettleOk(story.step(), "a1", 1, False))
    return story


def stored_twice() -> Story:
    story = Story()
    story.publish()
    story.publish()
    return story


def stored_twice_unknown_first() -> Story:
    story = Story()
    story.publish(outcome="unknown")
    story.publish()
    story.open()
    story.deliver()
    story.settle()
    story.deliver(tag=2)
    return story


def another_body_accepted() -> Story:
    story = Story()
    story.publish()
    story.publish(digest="e")
    return story


def duplicate_of_nothing() -> Story:
    story = Story()
    story.publish(outcome="duplicate")
    return story


def waiting_but_acked() -> Story:
    story = consumed()
    story.settle()
    story.finish(pending=1)
    return story


def gone_without_a_trace() -> Story:
    story = Story()
    story.publish()
    story.events.append(FinalGroup(story.step(), "a", "t", 0, 0, 0, 0))
    return story


def dead_letters_counted_wrongly() -> Story:
    story = Story()
    story.finish(dead=1)
    return story


def acked_and_dead() -> Story:
    story = consumed()
    story.settle()
    story.finish(dead=1)
    story.dead()
    return story


def dead_twice() -> Story:
    story = consumed()
    story.settle("rejected")
    story.finish(dead=2)
    story.dead(reason="rejected")
    story.dead(reason="rejected")
    return story


def group_forgotten() -> Story:
    story = Story("a", "b")
    story.publish()
    story.open()
    story.deliver()
    story.settle()
    story.finish()
    return story


BAD: list[tuple[str, Callable[[], Story]]] = [
    ("I1", never_delivered),
    ("I1", delivered_to_one_of_two_groups),
    ("I1", receipt_forgets_a_group),
    ("I2", never_published),
    ("I2", other_bytes),
    ("I2", corrupted_on_the_disk_and_delivered),
    ("I2", another_group),
    ("I2", refused_and_delivered),
    ("I2", dead_letter_from_nowhere),
    ("I2", dead_letter_of_another_topic),
    ("I9", acked_and_delivered_again),
    ("I9", acked_and_delivered_after_restart),
    ("I9", acked_and_delivered_twice_after_an_answered_duplicate),
    ("I10", nacked_and_forgotten),
    ("I10", lost_with_its_connection),
    ("I10", stale_ack_and_forgotten),
    ("I10", attempts_go_back),
    ("I10", durable_attempts_go_back_at_restart),
    ("I10", attempts_grow_by_restart),
    ("I10", over_the_limit),
    ("I10", dead_too_early),
    ("I10", rejected_and_delivered_again),
    ("I11", two_leases),
    ("I11", two_leases_in_spite_of_an_extension),
    ("I11", two_leases_although_the_ack_was_on_its_way),
    ("I14", stored_twice),
    ("I14", stored_twice_unknown_first),
    ("I14", another_body_accepted),
    ("I14", duplicate_of_nothing),
    ("I22", waiting_but_acked),
    ("I22", gone_without_a_trace),
    ("I22", dead_letters_counted_wrongly),
    ("I22", acked_and_dead),
    ("I22", dead_twice),
    ("I22", group_forgotten),
]


@pytest.mark.parametrize(("invariant", "told"), BAD, ids=lambda value: value if type(value) is str else value.__name__)
def test_what_may_not_happen_is_named(invariant: str, told: Callable[[], Story]) -> None:
    assert invariant in {violation.invariant for violation in check(told().events)}


def test_a_violation_names_message_and_group() -> None:
    violation = check(never_delivered().events)[0]
    assert str(violation) == "I1 m1 group a: accepted, the group was bound, and it was never delivered"


def test_histories_of_several_writers_are_merged_by_time(tmp_path: Path) -> None:
    events = failed_three_times_and_dead().events
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    with History(paths[0]) as one, History(paths[1]) as two:
        for number, event in enumerate(events):
            (one if number % 2 else two).write(event)
    assert read_histories(paths) == events
