"""The parts of delivery that need no broker: window of duplicates, waits, leases, members, order of handlers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.errors import ConfigError
from kiteq.limits import DUPLICATE_IDS_MAX, DUPLICATE_WINDOW_SECONDS
from kiteq.pipe.duplicates import DuplicateWindow
from kiteq.pipe.failures import JITTER_SHARE, wait_seconds
from kiteq.pipe.pipeline import HANDLERS, Pipeline, describe
from kiteq.store.writer import Recent
from tests.pipe.parts import lease_for, make_outlet, make_peer

# --- duplicates ---------------------------------------------------------------------------------


def ids_of(*numbers: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def crcs_of(*numbers: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in numbers]


def test_an_id_is_known_in_its_group_only() -> None:
    window = DuplicateWindow(0.0, 0)
    window.add("shop", ids_of(1, 2), crcs_of(7, 8))
    assert window.known("shop", ids_of(2, 3))
    assert not window.known("shop", ids_of(3))
    assert not window.known("other", ids_of(1))
    assert window.known("other", ids_of(9, 9)), "twice in one frame"
    assert window.body_crc("shop", ids_of(2)[0]) == crcs_of(8)[0]
    assert window.body_crc("other", ids_of(2)[0]) is None


def test_ids_are_forgotten_after_two_generations_and_their_rows_may_go() -> None:
    window = DuplicateWindow(0.0, 10)
    window.add("shop", ids_of(1), crcs_of(7))
    window.rotate(DUPLICATE_WINDOW_SECONDS - 1, 20)
    assert window.floor_commit == 0
    window.rotate(DUPLICATE_WINDOW_SECONDS, 30)
    window.add("shop", ids_of(2), crcs_of(7))
    assert window.known("shop", ids_of(1))
    assert window.floor_commit <= 10
    window.rotate(2 * DUPLICATE_WINDOW_SECONDS, 40)
    assert not window.known("shop", ids_of(1))
    assert window.known("shop", ids_of(2))
    assert window.floor_commit <= 30, "the rows of what is known are kept"


def test_forgotten_ids_are_new_and_take_no_room() -> None:
    window = DuplicateWindow(0.0, 0)
    window.add("shop", ids_of(1, 2), crcs_of(7, 8))
    window.forget("shop", ids_of(1))
    assert not window.known("shop", ids_of(1))
    assert window.known("shop", ids_of(2))
    assert window._young_count == 1


def test_the_window_is_rebuilt_back_to_its_age() -> None:
    window = DuplicateWindow(0.0, 9)
    rows = [(number, 1_000 * number, [Recent("shop", ids_of(number)[0], crcs_of(number)[0])]) for number in range(1, 6)]
    window.rebuild(rows, 3_000)
    assert [window.known("shop", ids_of(number)) for number in range(1, 6)] == [False, False, True, True, True]
    window.rotate(DUPLICATE_WINDOW_SECONDS, 9)
    assert window.floor_commit == 3


def test_a_full_window_is_known_as_full() -> None:
    window = DuplicateWindow(0.0, 0)
    count = DUPLICATE_IDS_MAX // 2
    window.add("shop", ids_of(*range(count)), crcs_of(*range(count)))
    before = window.is_full
    window.rotate(1.0, 5)
    assert (before, window.is_full) == (True, False)
    assert window.known("shop", ids_of(0))


# --- waits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(1, 0), (2, 0), (3, 5), (9, 5), (10, 10), (19, 10), (20, 20), (29, 20), (30, 40), (40, 80), (50, 160), (99, 160)],
)
def test_the_wait_grows_with_the_failures(failures: int, seconds: float) -> None:
    for _ in range(20):
        assert seconds <= wait_seconds(failures) <= seconds * (1 + JITTER_SHARE)


# --- leases -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_a_message_of_a_lease_is_taken_once(spans: list[tuple[int, int]]) -> None:
    peer = make_peer()
    lease = lease_for(peer, make_outlet(), 10)
    left = set(range(10))
    for start, stop in ((min(span), max(span) + 1) for span in spans):
        taken = {index for run in lease.take(start, stop) for index in range(*run)}
        assert taken == left & set(range(start, stop))
        left -= taken
        assert lease.open == peer.in_flight == len(left)
    if not lease.open:
        peer.release(lease)
        assert (peer.in_flight_bytes, peer.leases()) == (0, [])


def test_a_tag_belongs_to_the_lease_that_holds_it() -> None:
    peer, outlet = make_peer(), make_outlet()
    first, second, third = (lease_for(peer, outlet, count) for count in (3, 2, 4))
    assert [lease.first_tag for lease in peer.leases()] == [1, 4, 6]
    assert peer.lease_of(0) == (None, 1)
    assert peer.lease_of(3) == (first, 4)
    assert peer.lease_of(5) == (second, 6)
    assert peer.lease_of(9)[0] is third
    assert peer.lease_of(10)[0] is None
    second.take(0, 2)
    peer.release(second)
    assert peer.lease_of(4) == (None, 6)
    assert lease_for(peer, outlet, 1).first_tag == 10, "a tag is never used again"
    assert peer.in_flight == 8


# --- members ------------------------------------------------------------------------------------


def test_the_member_with_most_free_credit_is_next() -> None:
    outlet = make_outlet()
    group = outlet.group
    assert group.best_member(0.0) == (None, 0)
    small, large = make_peer(window=10), make_peer(window=50)
    group.members += [small]
    assert group.best_member(0.0) == (small, 10)
    group.members += [large]
    member, count = group.best_member(0.0)
    assert member is large
    assert 0 < count <= 50
    large.leaving = True
    assert group.best_member(0.0)[0] is small
    small.window = 0
    assert group.best_member(0.0) == (None, 0)
    assert not group.consuming


def test_a_member_that_warms_up_gets_a_share() -> None:
    peer = make_peer(window=100)
    peer.warm_up = 10
    assert [peer.free_credit(now) for now in (0.0, 1.0, 5.0)] == [1, 10, 50]
    assert peer.free_credit(10.0) == 100


# --- the order of handlers ----------------------------------------------------------------------


class Begun:
    """An event."""


class Handled:
    """Another."""


class First:
    accepts: tuple[type[Any], ...] = ()
    emits: tuple[type[Any], ...] = (Begun,)

    def handle(self, event: Any) -> list[Any]:
        return [Begun()]


class Second:
    accepts: tuple[type[Any], ...] = (Begun,)
    emits: tuple[type[Any], ...] = ()

    def handle(self, event: Any) -> list[Any]:
        return []


class Deaf:
    accepts: tuple[type[Any], ...] = (Handled,)
    emits: tuple[type[Any], ...] = ()

    def handle(self, event: Any) -> list[Any]:
        return []


def test_an_order_that_cannot_work_is_refused() -> None:
    Pipeline([First(), Second()])
    with pytest.raises(ConfigError, match="accepts Begun, which no handler before it emits"):
        Pipeline([Second(), First()])
    with pytest.raises(ConfigError, match="accepts Handled"):
        Pipeline([First(), Second(), Deaf()])
    with pytest.raises(ConfigError, match="Begun"):
        Pipeline([First()])


def test_the_description_names_every_handler_in_order() -> None:
    text = describe()
    places = [text.index(handler.__name__.lower()) for handler in HANDLERS]
    assert places == sorted(places)
