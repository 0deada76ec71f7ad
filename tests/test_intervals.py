"""The set of settled sequences against a plain set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.store.intervals import IntervalSet

TOP = 60
pairs = st.tuples(st.integers(0, TOP), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.integers(0, 20), st.lists(pairs, max_size=30))
def test_it_holds_what_a_set_would_hold(floor: int, added: list[tuple[int, int]]) -> None:
    intervals, model = IntervalSet(floor), set(range(floor))
    for low, high in added:
        intervals.add(low, high)
        model.update(range(low, high + 1))
    everything = range(TOP + 20)
    assert {number for number in everything if number in intervals} == model
    assert intervals.floor == next(number for number in everything if number not in model)
    flat = intervals.ranges
    assert flat == sorted(flat)
    bounds = [intervals.floor - 1, *flat]
    gaps = [low - high for high, low in zip(bounds[::2], bounds[1::2], strict=False)]
    assert all(gap > 1 for gap in gaps), "neighbours are joined"


@given(st.integers(0, 20), st.lists(pairs, max_size=20), st.integers(0, TOP), st.integers(-1, 40))
def test_gaps_are_what_is_missing(floor: int, added: list[tuple[int, int]], low: int, length: int) -> None:
    intervals, model = IntervalSet(floor), set(range(floor))
    for first, last in added:
        intervals.add(first, last)
        model.update(range(first, last + 1))
    high = low + length
    missing = [number for number in range(low, high + 1) if number not in model]
    gaps = list(intervals.gaps(low, high))
    assert [number for first, last in gaps for number in range(first, last + 1)] == missing
    assert intervals.count_missing(low, high) == len(missing)


@given(st.integers(0, 20), st.lists(pairs, max_size=20))
def test_it_is_rebuilt_from_floor_and_ranges(floor: int, added: list[tuple[int, int]]) -> None:
    intervals = IntervalSet(floor)
    for low, high in added:
        intervals.add(low, high)
    again = IntervalSet(intervals.floor, intervals.ranges)
    assert again == intervals
    assert repr(again) == f"IntervalSet({intervals.floor}, {intervals.ranges})"


def test_a_copy_is_its_own() -> None:
    intervals = IntervalSet(3, [5, 6])
    copy = intervals.copy()
    copy.add(3, 10)
    assert (intervals.floor, intervals.ranges) == (3, [5, 6])
    assert (copy.floor, copy.ranges) == (11, [])


def test_the_floor_swallows_the_ranges_it_reaches() -> None:
    intervals = IntervalSet(0, [5, 6, 8, 9, 20, 21])
    intervals.add(0, 4)
    assert (intervals.floor, intervals.ranges) == (7, [8, 9, 20, 21])
    intervals.add(7, 7)
    assert (intervals.floor, intervals.ranges) == (10, [20, 21])


def test_the_ranges_are_a_copy() -> None:
    intervals = IntervalSet(0, [5, 6])
    intervals.ranges.append(9)
    assert intervals.ranges == [5, 6]


def test_an_odd_list_of_ranges_is_refused() -> None:
    with pytest.raises(ValueError):
        IntervalSet(0, [5, 6, 8])


def test_it_is_equal_only_to_its_like() -> None:
    assert IntervalSet(4) != IntervalSet(5)
    assert IntervalSet(4) != 4


@pytest.mark.parametrize("top", [(1 << 63) - 1, (1 << 64) - 1])
def test_the_largest_numbers_fit(top: int) -> None:
    intervals = IntervalSet()
    intervals.add(top, top)
    assert top in intervals
    assert top - 1 not in intervals
    assert intervals.count_missing(0, top) == top
