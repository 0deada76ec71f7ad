"""Undecided transactions are found again, and decided ones stay decided, whatever a crash cut off."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from kiteq.store.half_reading import find_decisions
from kiteq.store.half_recovery import META_CLEAN
from kiteq.store.halves import State
from kiteq.store.lmdb import LmdbTables
from kiteq.store.memory import MemoryTables
from kiteq.store.tables import Table
from tests.store.half_history import CHECK_MS, History, again, check, rows_in

MIB = 1 << 20


class Histories(RuleBasedStateMachine):
    """Random histories; at the end every commit is cut at."""

    def __init__(self) -> None:
        super().__init__()
        self.history = History()

    def pick(self, data: st.DataObject) -> list[bytes]:
        """Return some undecided transactions of one group; there always are some."""
        undecided = self.history.known.undecided
        if not undecided:
            self.history.prepare("p", b"1" * 16, [1, 2, 1])
        ids = data.draw(st.lists(st.sampled_from(sorted(undecided)), min_size=1, max_size=4, unique=True))
        return [one for one in ids if undecided[one].group == undecided[ids[0]].group]

    @rule(
        group=st.sampled_from(["p", "q"]),
        instance=st.sampled_from([b"1" * 16, b"2" * 16]),
        sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    )
    def prepare(self, group: str, instance: bytes, sizes: list[int]) -> None:
        self.history.prepare(group, instance, sizes)

    @rule(data=st.data(), commit=st.booleans(), refused=st.sampled_from([False, False, True]))
    def decide(self, data: st.DataObject, commit: bool, refused: bool) -> None:
        ids = self.pick(data)
        if refused:
            self.history.decide_in_vain(ids, commit=commit)
        else:
            self.history.decide(ids, commit=commit)

    @rule(data=st.data(), count=st.integers(1, 2))
    def enlist(self, data: st.DataObject, count: int) -> None:
        self.history.enlist(self.pick(data)[0], count)

    @rule(data=st.data(), unknown=st.booleans(), parked=st.booleans())
    def ask(self, data: st.DataObject, unknown: bool, parked: bool) -> None:
        self.history.ask(self.pick(data)[0], unknown=unknown, parked=parked)

    @rule(
        what=st.sampled_from(["tidy", "restart", "restart and tidy", "time"]), seconds=st.sampled_from([1, 60, 4_000])
    )
    def upkeep(self, what: str, seconds: int) -> None:
        if "restart" in what:
            self.history.restart()
        if "tidy" in what:
            self.history.tidy()
        if what == "time":
            self.history.pass_time(seconds)

    def teardown(self) -> None:
        cut = MemoryTables(64 * MIB)
        for rows, expected in zip(self.history.tables.applied, self.history.expected[1:], strict=True):
            cut.apply(rows)
            check(again(cut), expected)


def test_every_prefix_of_the_commits_is_recovered() -> None:
    run_state_machine_as_test(Histories, settings=settings(max_examples=60, stateful_step_count=20))


@pytest.mark.long
def test_every_prefix_of_many_long_histories_is_recovered() -> None:
    run_state_machine_as_test(Histories, settings=settings(max_examples=2_000, stateful_step_count=50))


@given(st.integers(0, 1 << 30), st.integers(2, 5))
@settings(max_examples=10)
@example(0, 3)
def test_a_history_on_disk_is_recovered_after_any_commit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, size: int
) -> None:
    history = History()
    history.prepare("p", b"1" * 16, [1] * size)
    ids = list(history.known.undecided)
    history.enlist(ids[-1], 2)
    history.decide(ids[:1], commit=True)
    history.ask(ids[-1], unknown=True, parked=True)
    history.tidy()
    history.restart()
    history.decide(ids[1:2], commit=False)
    history.restart()
    history.tidy()
    cut = seed % (len(history.tables.applied) + 1)
    tables = LmdbTables(tmp_path_factory.mktemp("store") / "data", 64 * MIB)
    try:
        history.cut(cut, tables)
        check(tables, history.expected[cut])
        check(tables, history.expected[cut])
    finally:
        tables.close()


def test_what_was_decided_before_a_restart_stays_decided_when_one_of_its_row_is_left() -> None:
    history = History()
    history.prepare("p", b"1" * 16, [1, 1])
    decided, _ = history.known.undecided
    history.decide([decided], commit=False)
    history.restart()
    history.tidy()
    check(again(history.tables), history.known)


def test_what_was_decided_stays_decided_when_the_store_refuses_the_decision_of_the_last_of_its_row() -> None:
    history = History()
    history.prepare("p", b"1" * 16, [1, 1])
    first, last = history.known.undecided
    history.decide([first], commit=False)
    history.decide_in_vain([last], commit=True)
    history.tidy()
    check(again(history.tables), history.known)


def test_a_parked_transaction_keeps_its_own_time_beside_one_that_was_never_asked_about() -> None:
    history = History()
    history.prepare("p", b"1" * 16, [1])
    [parked] = history.known.undecided
    history.ask(parked, unknown=True, parked=True)
    history.pass_time((history.known.undecided[parked].due_ms - CHECK_MS - history.now_ms) // 1000)
    history.prepare("p", b"1" * 16, [1])
    history.restart()
    planned = history.opened.store.take_recovered().halves.checks
    assert [len(slots) for slots, _ in planned] == [1, 1]


def test_a_damaged_row_of_checks_lets_the_checks_begin_again() -> None:
    history = History()
    history.prepare("p", b"1" * 16, [1])
    [one] = history.known.undecided
    before = history.expected[-1]
    history.ask(one, unknown=True, parked=True)
    [(key, value)] = rows_in(history.tables, Table.CHECKS)
    for at in range(len(value)):
        copy = again(history.tables)
        copy.apply([(Table.CHECKS, key, value[:at] + bytes([value[at] ^ 0x81]) + value[at + 1 :])])
        check(copy, before)


def test_a_damaged_note_of_how_far_rows_are_clean_brings_nothing_back() -> None:
    history = History()
    history.prepare("p", b"1" * 16, [1, 1, 1])
    first, second, _ = history.known.undecided
    history.decide([first], commit=True)
    history.tidy()
    history.decide([second], commit=False)
    value = history.tables.get(Table.META, META_CLEAN)
    assert value is not None
    for at in range(len(value)):
        for bit in range(8):
            copy = again(history.tables)
            copy.apply([(Table.META, META_CLEAN, value[:at] + bytes([value[at] ^ 1 << bit]) + value[at + 1 :])])
            check(copy, history.known)


def damaged_first_message(history: History) -> None:
    """Flip a bit in the id of the first message of the first row."""
    key, value = rows_in(history.tables, Table.HALF)[0]
    at = value.index(next(iter(history.known.undecided.values())).blobs[0])
    history.tables.apply([(Table.HALF, key, value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :])])


def test_a_transaction_whose_first_message_is_damaged_is_not_thrown_away_by_tidying() -> None:
    history = History()
    history.prepare("p", b"1" * 16, [2, 1])
    whole, decided = history.known.undecided
    damaged_first_message(history)
    history.decide([decided], commit=True)
    history.tidy()
    slot = history.halves.find(whole)
    assert slot is not None
    history.restart()
    assert len(history.halves) == 1
    assert history.halves.state[0] == State.OPEN


def test_messages_added_to_a_transaction_whose_row_is_damaged_are_put_aside_with_it() -> None:
    history = History()
    history.prepare("p", b"1" * 16, [1])
    [one] = history.known.undecided
    history.enlist(one, 1)
    [(key, value), (_, added)] = rows_in(history.tables, Table.HALF)
    history.tables.apply([(Table.HALF, key, value[:30] + bytes([value[30] ^ 1]) + value[31:])])
    history.restart()
    assert rows_in(history.tables, Table.HALF) == []
    assert added in [row for _, row in rows_in(history.tables, Table.QUARANTINE)]


def test_a_damaged_row_of_decisions_is_no_decision() -> None:
    history = History()
    history.prepare("p", b"1" * 16, [1, 1])
    first, second = history.known.undecided
    before = history.expected[-1]
    history.decide([first], commit=True)
    [(key, value)] = rows_in(history.tables, Table.DECISIONS)
    for at in range(len(value)):
        copy = again(history.tables)
        copy.apply([(Table.DECISIONS, key, value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :])])
        assert find_decisions(copy, [first, second], 99) == {}
        check(copy, before)
