"""The checker names the invariant of everything that may not happen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.checker import check
from tests.faults.history import (
    Corrupted,
    Extended,
    FinalGroup,
    SettleOk,
)
from tests.faults.story import DEADLINE, Story, consumed


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
