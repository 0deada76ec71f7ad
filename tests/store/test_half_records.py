"""Rows of transactions: what is packed comes back, and damage is noticed at every byte."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.errors import KiteQError
from kiteq.message import Message
from kiteq.store.half_reading import read_checks, read_halves, rewritten
from kiteq.store.half_records import (
    COUNTER_KEY,
    CheckState,
    find_decision,
    first_ids,
    messages_of,
    pack_checks,
    pack_decisions,
    pack_half,
    parse_checks,
    parse_decisions,
    parse_half_head,
)
from kiteq.store.memory import MemoryTables
from kiteq.store.tables import Table

GROUPS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)
NUMBERS = st.integers(0, (1 << 64) - 1)
TIMES = st.integers(0, (1 << 63) - 1)


def blobs_of(sizes: list[int], start: int = 0) -> list[bytes]:
    """Return so many different messages, with bodies of different lengths."""
    return [
        Message("t", "a", b"%d" % at * (at % 7), id=at.to_bytes(16, "big")).encoded()
        for at in range(start, start + sum(sizes))
    ]


@dataclass(frozen=True)
class Half:
    """A row of half messages and what was packed into it."""

    key: bytes
    value: bytes
    handles: list[int]
    sizes: list[int]
    blobs: list[bytes]

    @property
    def by_handle(self) -> dict[int, list[bytes]]:
        parts = pairwise(accumulate(self.sizes, initial=0))
        return {handle: self.blobs[start:end] for handle, (start, end) in zip(self.handles, parts, strict=True)}


def half_of(row: int, gaps: list[int], sizes: list[int]) -> Half:
    key, blobs = COUNTER_KEY.pack(row), blobs_of(sizes)
    handles = list(accumulate(gaps[1:], initial=row + gaps[0]))
    return Half(key, pack_half(key, "shop", b"i" * 16, 1_000, 6_000, handles, sizes, blobs), handles, sizes, blobs)


HALVES = st.integers(1, 6).flatmap(
    lambda count: st.builds(
        half_of,
        st.integers(1, 1 << 62),
        st.lists(st.integers(1, 9), min_size=count, max_size=count),
        st.lists(st.integers(1, 3), min_size=count, max_size=count),
    )
)


def flipped(value: bytes, at: int, bit: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1 << bit]) + value[at + 1 :]


def read(half: Half, value: bytes, key: bytes | None = None) -> dict[int, list[bytes | None]]:
    tables = MemoryTables(1 << 30)
    row = half.key if key is None else key
    tables.apply([(Table.HALF, row, value)])
    found = read_halves(tables, {handle: [COUNTER_KEY.unpack(row)[0]] for handle in half.handles})
    return {handle: one.blobs for handle, one in found.items()}


@given(HALVES, GROUPS, st.binary(min_size=16, max_size=16), TIMES, st.integers(0, (1 << 32) - 1), st.booleans())
def test_a_row_of_half_messages_comes_back_whole(
    half: Half, group: str, instance: bytes, prepared_ms: int, check_ms: int, enlisted: bool
) -> None:
    value = pack_half(
        half.key, group, instance, prepared_ms, check_ms, half.handles, half.sizes, half.blobs, enlisted=enlisted
    )
    head = parse_half_head(half.key, value)
    assert (head.group, head.instance, head.prepared_ms, head.check_ms) == (group, instance, prepared_ms, check_ms)
    assert (list(head.handles), list(head.sizes), head.enlisted) == (half.handles, half.sizes, enlisted)
    assert messages_of(value, head, 0, len(half.blobs)) == half.blobs
    assert first_ids(value, head) == [blobs[0][:16] for blobs in half.by_handle.values()]
    assert read(half, value) == half.by_handle


@given(HALVES, st.data())
def test_a_flipped_bit_in_half_messages_never_makes_another_message(half: Half, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(half.value) - 1))
    value = flipped(half.value, at, data.draw(st.integers(0, 7)))
    found = read(half, value)
    head_size = len(half.value) - sum(map(len, half.blobs))
    if at < head_size:
        assert found == {}
        return
    wrong = {(handle, index) for handle in found for index, blob in enumerate(found[handle]) if blob is None}
    assert len(wrong) == 1
    for handle, blobs in half.by_handle.items():
        assert [found[handle][index] for index in range(len(blobs)) if (handle, index) not in wrong] == [
            blob for index, blob in enumerate(blobs) if (handle, index) not in wrong
        ]


def test_every_single_flipped_bit_of_a_row_is_noticed() -> None:
    half = half_of(7, [1, 3], [1, 2])
    for at in range(len(half.value)):
        for bit in range(8):
            found = read(half, flipped(half.value, at, bit))
            blobs = [blob for one in found.values() for blob in one]
            assert blobs.count(None) == 1 or not blobs, (at, bit)


@given(HALVES, st.data())
def test_a_row_that_was_cut_off_is_noticed(half: Half, data: st.DataObject) -> None:
    found = read(half, half.value[: data.draw(st.integers(0, len(half.value) - 1))])
    assert all(set(found[handle]) <= {*half.by_handle[handle], None} for handle in found)
    assert not found or None in [blob for blobs in found.values() for blob in blobs]


@given(HALVES)
def test_a_row_at_the_place_of_another_is_noticed(half: Half) -> None:
    assert read(half, half.value, COUNTER_KEY.pack(COUNTER_KEY.unpack(half.key)[0] + 1)) == {}


@given(HALVES, st.data())
def test_a_rewritten_row_has_what_stays(half: Half, data: st.DataObject) -> None:
    stay = set(data.draw(st.lists(st.sampled_from(half.handles), unique=True)))
    ids = {handle: blobs[0][:16] for handle, blobs in half.by_handle.items()}
    row = rewritten(
        COUNTER_KEY.unpack(half.key)[0], half.value, lambda id_, handle: ids[handle] == id_ and handle in stay
    )
    assert row is not None
    assert row[:2] == (Table.HALF, half.key)
    assert row[2] is not None
    assert read(half, row[2]) == {handle: blobs for handle, blobs in half.by_handle.items() if handle in stay}
    old, new = parse_half_head(half.key, half.value), parse_half_head(half.key, row[2])
    assert (new.group, new.instance, new.prepared_ms, new.check_ms) == (
        old.group, old.instance, old.prepared_ms, old.check_ms,
    )  # fmt: skip


# --- decisions ------------------------------------------------------------------------------------

ENTRIES = st.lists(
    st.tuples(NUMBERS, st.binary(min_size=16, max_size=16), st.booleans(), st.booleans()),
    min_size=1,
    max_size=8,
    unique_by=lambda entry: entry[1],
)


@given(ENTRIES, TIMES, GROUPS, st.text(max_size=40), st.none() | st.text(max_size=40))
def test_a_row_of_decisions_comes_back_whole(
    entries: list[tuple[int, bytes, bool, bool]], at_ms: int, group: str, by: str, reason: str | None
) -> None:
    key = COUNTER_KEY.pack(9)
    value = pack_decisions(key, at_ms, group, by, reason, entries)
    row = parse_decisions(key, value)
    assert (row.at_ms, row.group, row.by, row.reason) == (at_ms, group, by, reason)
    assert [tuple(one) for one in row.decisions] == entries
    for entry in entries:
        found = find_decision(key, value, entry[1])
        assert found is not None
        assert tuple(found[1]) == entry


def test_a_flipped_bit_is_never_a_decision() -> None:
    key = COUNTER_KEY.pack(9)
    entries = [(5, b"a" * 16, True, False), (6, b"b" * 16, False, True)]
    value = pack_decisions(key, 1_000, "shop", "127.0.0.1:9", "a reason", entries)
    for at in range(len(value)):
        for bit in range(8):
            damaged = flipped(value, at, bit)
            with pytest.raises(KiteQError):
                parse_decisions(key, damaged)
            assert all(find_decision(key, damaged, entry[1]) is None for entry in entries)
    for end in range(len(value)):
        assert find_decision(key, value[:end], b"a" * 16) is None
    assert find_decision(COUNTER_KEY.pack(8), value, b"a" * 16) is None


# --- checks ---------------------------------------------------------------------------------------

HISTORIES = st.lists(st.tuples(TIMES, st.text(max_size=9), st.text(max_size=9), TIMES).map(list), max_size=4)
STATES = st.builds(CheckState, st.integers(0, 255), st.integers(0, 255), TIMES, TIMES, HISTORIES)


@given(STATES)
def test_the_state_of_checks_comes_back_whole(state: CheckState) -> None:
    assert parse_checks(pack_checks(state)) == state


def test_a_damaged_state_of_checks_is_as_if_nothing_was_asked() -> None:
    nothing = parse_checks(None)
    value = pack_checks(CheckState(3, 2, 77_000, 5, [[1, "127.0.0.1:9", "unknown", 2]]))
    for at in range(len(value)):
        for bit in range(8):
            tables = MemoryTables(1 << 20)
            tables.apply([(Table.CHECKS, COUNTER_KEY.pack(4), flipped(value, at, bit))])
            assert read_checks(tables, 4) == nothing, (at, bit)
    assert all(parse_checks(value[:end]) == nothing for end in range(len(value)))
