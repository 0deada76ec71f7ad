"""The checker says nothing about what may happen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.checker import check
from tests.faults.history import (
    Bound,
    Corrupted,
    FinalGroup,
    Stalled,
)
from tests.faults.story import DEADLINE, Story, consumed


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


def came_late_through_a_stalled_line_and_again() -> Story:
    story = Story()
    story.publish()
    story.open()
    began = story.step()
    story.step(DEADLINE)
    story.deliver(tag=1)
    story.deliver(tag=2, attempt=2)
    story.settle(tag=1, stale=True)
    story.settle(tag=2)
    story.events.append(Stalled(story.step(), began))
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
    came_late_through_a_stalled_line_and_again,
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


def test_a_stall_excuses_nothing_that_happens_long_after_it() -> None:
    told = came_late_through_a_stalled_line_and_again()
    stall = next(event for event in told.events if isinstance(event, Stalled))
    told.events[told.events.index(stall)] = stall._replace(at=stall.began + 0.1)
    assert {violation.invariant for violation in check(told.events)} == {"I10", "I11"}
