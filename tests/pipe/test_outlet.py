"""What waits for a consumer goes out once, in order, and the rest stays in the log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kiteq.limits import READY_BYTES_MAX
from kiteq.pipe.leases import Chunk
from kiteq.pipe.outlet import Outlet
from tests.pipe.parts import EXPIRES_MS, chunk_of, make_outlet, make_peer


def consuming() -> Outlet:
    outlet = make_outlet()
    outlet.group.members.append(make_peer())
    return outlet


def drained(outlet: Outlet) -> list[int]:
    found: list[int] = []
    while outlet.ready:
        found += outlet.take(1 << 30).sequences
    assert outlet.ready_bytes == 0
    return found


def test_neighbours_of_one_moment_are_joined() -> None:
    outlet = consuming()
    outlet.add_new(chunk_of(0, 3))
    outlet.add_new(chunk_of(3, 2))
    outlet.add_new(chunk_of(9, 2))
    assert [list(chunk.sequences) for chunk in outlet.ready] == [[0, 1, 2, 3, 4], [9, 10]]
    assert outlet.ready[1].low == 5, "what lies between is not owed to this group"
    assert outlet.position == 11
    assert drained(outlet) == [0, 1, 2, 3, 4, 9, 10]


def test_what_is_put_back_goes_out_first() -> None:
    outlet = consuming()
    outlet.add_new(chunk_of(0, 6))
    first, second = outlet.take(2), outlet.take(2)
    assert (list(first.sequences), list(second.sequences)) == ([0, 1], [2, 3])
    assert second.low == 2
    outlet.put_back(second)
    outlet.put_back(first)
    assert drained(outlet) == [0, 1, 2, 3, 4, 5]


def test_with_nobody_there_messages_stay_in_the_log() -> None:
    outlet = make_outlet()
    outlet.add_new(chunk_of(0, 3))
    assert (len(outlet.ready), outlet.behind, outlet.position) == (0, True, 0)


def test_memory_is_bounded_and_nothing_overtakes_what_was_left_out() -> None:
    outlet = consuming()
    outlet.add_new(Chunk(range(1), 0, [bytes(READY_BYTES_MAX + 1)], 5, EXPIRES_MS))
    outlet.add_new(chunk_of(1, 1))
    assert outlet.behind
    outlet.take(1)
    outlet.add_new(chunk_of(2, 1))
    assert (len(outlet.ready), outlet.position) == (0, 1)


@given(st.permutations(range(4)), st.sets(st.integers(0, 3)))
def test_what_is_forgotten_is_read_again_and_nothing_is_twice(order: list[int], failed: set[int]) -> None:
    outlet = consuming()
    outlet.add_new(chunk_of(0, 8))
    outlet.add_new(chunk_of(8, 8))
    parts = [outlet.take(2) for _ in range(4)]
    for number in order:  # as leases come back in any order
        parts[number].failures = 1 if number in failed else 0
        outlet.put_back(parts[number])
    outlet.forget_untouched()
    kept = [sequence for chunk in outlet.ready for sequence in chunk.sequences]
    reread = list(range(outlet.position, 16))
    assert sorted(kept + reread) == list(range(16))
    assert outlet.behind == bool(reread)
    assert outlet.ready_bytes == sum(len(blob) for chunk in outlet.ready for blob in chunk.blobs)


def test_what_is_forgotten_is_read_again_with_the_gap_before_it() -> None:
    outlet = consuming()
    outlet.add_new(chunk_of(0, 3))
    outlet.add_new(chunk_of(9, 2))
    outlet.take(3)
    outlet.forget_untouched()
    assert outlet.position == 3, "else the gap is never settled, and stays a hole of the cursor"


def test_nothing_is_forgotten_while_messages_are_held() -> None:
    outlet = consuming()
    outlet.add_new(chunk_of(0, 4))
    outlet.leased = 1
    outlet.forget_untouched()
    assert (len(outlet.ready), outlet.behind) == (1, False)


def test_fly_messages_wait_only_while_somebody_takes_them() -> None:
    outlet = make_outlet()
    assert outlet.add_fly([b"a", b"b"]) == 2
    outlet.group.members.append(make_peer())
    assert outlet.add_fly([b"a", b"b"]) == 0
    outlet.forget_untouched()
    assert (len(outlet.fly), outlet.dropped) == (0, 4)


def test_a_watermark_lets_its_rate_through() -> None:
    outlet = make_outlet(watermark=100)
    sent = 0
    for tick in range(1, 101):
        count = outlet.allowance(tick / 100)
        outlet.use_allowance(count)
        sent += count
    assert 90 <= sent <= 125
    assert outlet.allowance(1_000.0) <= 20, "a pause is no credit for a burst"
