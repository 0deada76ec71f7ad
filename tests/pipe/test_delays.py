"""Which messages have to wait, and until when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.errors import Refused
from kiteq.limits import DELAY_MS_MAX
from kiteq.message import Extras, Message
from kiteq.pipe.delays import Delays, check_due, due_of, split_delayed

NOW_MS = 1_700_000_000_000
KINDS = st.sampled_from(["a", "b"])
WAITS = st.one_of(
    st.none(),
    st.tuples(st.just("delay"), st.integers(0, 5)),
    st.tuples(st.just("deliver_at"), st.integers(NOW_MS - 3, NOW_MS + 3)),
)


def message_of(kind: str, wait: tuple[str, int] | None, number: int) -> Message:
    properties = {"n": "1"} if number % 3 == 0 else {}
    times = {} if wait is None else {wait[0]: wait[1] / 1000}
    return Message("t", kind, b"%d" % number, properties=properties, **times)  # type: ignore[arg-type]


@given(st.lists(st.tuples(KINDS, WAITS), max_size=12))
def test_every_message_is_deliverable_at_once_or_due_at_its_time_and_the_order_is_kept(
    wanted: list[tuple[str, tuple[str, int] | None]],
) -> None:
    messages = [message_of(kind, wait, number) for number, (kind, wait) in enumerate(wanted)]
    expected: dict[int | None, list[bytes]] = {}
    for message, (_, wait) in zip(messages, wanted, strict=True):
        if wait is None or wait[1] == 0 or (wait[0] == "deliver_at" and wait[1] <= NOW_MS):
            due_ms = None
        else:
            due_ms = wait[1] if wait[0] == "deliver_at" else NOW_MS + 1 + wait[1]
        expected.setdefault(due_ms, []).append(message.encoded())
    at_once, by_due = split_delayed([message.encoded() for message in messages], NOW_MS)
    assert at_once == expected.pop(None, [])
    assert by_due == expected


@given(st.integers(1, DELAY_MS_MAX), st.integers(0, 999))
def test_a_delay_ends_after_it_however_the_clock_was_rounded(delay_ms: int, microseconds: int) -> None:
    accepted_us = NOW_MS * 1000 + microseconds
    due_ms = due_of(Extras({}, None, delay_ms, None), accepted_us // 1000)
    assert due_ms is not None
    assert due_ms * 1000 >= accepted_us + delay_ms * 1000


def test_a_time_more_than_a_year_ahead_is_refused_and_the_longest_delay_is_not() -> None:
    longest = due_of(Extras({}, None, DELAY_MS_MAX, None), NOW_MS)
    assert longest is not None
    check_due(longest, NOW_MS)
    with pytest.raises(Refused, match="at most 366 days ahead") as refused:
        check_due(longest + 1, NOW_MS)
    assert refused.value.code == "bad_limit"


def test_numbers_are_not_given_again_after_a_restart() -> None:
    blob = Message("t", "a").encoded()
    before, after = Delays(epoch=7), Delays(epoch=8)
    keys = [before.save("g", {5: [blob] * 3}, 1).rows[0][1] for _ in range(2)]
    keys += [after.save("g", {5: [blob]}, 1).rows[0][1] for _ in range(2)]
    assert keys == sorted(set(keys))
    assert [after.is_new(key) for key in keys] == [False, False, True, True]


def test_what_is_removed_before_it_was_counted_is_not_taken_from_the_count() -> None:
    blob = Message("t", "a").encoded()
    old_first, old_second = (row[1] for row in Delays(epoch=7).save("g", {5: [blob], 6: [blob]}, 1).rows)
    delays = Delays(epoch=8)
    saved = delays.save("g", {7: [blob, blob]}, 1)
    delays.stored(saved)
    assert (delays.messages, delays.size, delays.next_ms) == (2, saved.size, 7)
    delays.counted_to = old_first
    delays.messages, delays.size = delays.messages + 1, delays.size + 100
    delays.removed(old_second, 1, 100)
    assert delays.messages == 3
    delays.removed(old_first, 1, 100)
    delays.removed(saved.rows[0][1], 2, saved.size)
    assert (delays.messages, delays.size) == (0, 0)
