"""The index of records against a plain dict."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kiteq.store.index import SEGMENT_RECORDS, RecordIndex


@settings(max_examples=30)
@given(st.randoms(use_true_random=False), st.integers(1, 2 * SEGMENT_RECORDS + 100), st.integers(1, 3))
def test_it_counts_what_is_owed_like_a_dict(random: object, count: int, owners: int) -> None:
    assert hasattr(random, "shuffle")
    assert hasattr(random, "randrange")
    index, lengths, owed = RecordIndex(), dict[int, int](), dict[int, int]()
    position = 0
    for _ in range(count):
        position += random.randrange(3)  # gaps between records
        length = 1 + random.randrange(3)
        index.append(position, length * owners, length * owners, 5_000)
        lengths[position], owed[position] = length, length * owners
        position += length
    tasks = [(first, number) for first in lengths for number in range(owners)]
    random.shuffle(tasks)
    for number, (first, _) in enumerate(tasks):
        done = index.settle(range(first, first + lengths[first]))
        owed[first] -= lengths[first]
        assert done == ([first] if not owed[first] else [])
        entry = index.entry(first)
        assert (entry.owed if entry else 0) == owed[first]
        if number % 97 == 0:
            compare(index, owed, lengths, first)
    assert len(index) == 0
    assert list(index.entries()) == []
    assert not any(segment.mostly_settled or segment.expired for segment in index.segments(9))


def compare(index: RecordIndex, owed: dict[int, int], lengths: dict[int, int], sequence: int) -> None:
    left = [first for first, count in owed.items() if count]
    assert [(entry.first, entry.owed) for entry in index.entries()] == [(first, owed[first]) for first in left]
    assert len(index) == len(left)
    start = index.at_or_before(sequence)
    assert start <= sequence
    holder = max((first for first in left if first <= sequence), default=None)
    if holder is not None and sequence < holder + lengths[holder]:
        assert start == holder, "the record that holds the sequence is read from its start"


def test_one_call_settles_many_records() -> None:
    index = RecordIndex()
    for first in range(0, 3 * SEGMENT_RECORDS, 3):
        index.append(first, 3, 3, 0)
    done = index.settle([sequence for sequence in range(3 * SEGMENT_RECORDS) if sequence != 4])
    assert done == [first for first in range(0, 3 * SEGMENT_RECORDS, 3) if first != 3]
    assert [entry.first for entry in index.entries()] == [3]
    assert index.settle([4]) == [3]


def test_a_rewritten_record_owes_what_was_left() -> None:
    index = RecordIndex()
    index.append(10, 8, 8, 2_000)
    index.settle(range(10, 15))
    (segment,) = index.segments(3)
    assert (segment.expired, segment.mostly_settled) == ([10], [10])
    (segment,) = index.segments(2)
    assert segment.expired == []
    index.replace(10, 3)
    assert index.entry(10) == (10, 3, 3, 2)
    assert next(index.segments(3)).mostly_settled == []


def test_a_record_owed_to_nobody_is_not_kept() -> None:
    index = RecordIndex()
    index.append(0, 0, 4, 0)
    assert len(index) == 0
    assert (index.at_or_before(7), index.entry(0)) == (7, None)
