"""The one writer: what it joins, splits, refuses and deletes."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.errors import KiteQError, StoreError, StoreFailed, StoreFull
from kiteq.limits import RECORD_BYTES_MAX
from kiteq.message import Message
from kiteq.store import records
from kiteq.store.tables import SEQUENCE_KEY, Row, Table
from kiteq.store.writer import (
    ACK_TRIES,
    Append,
    NewRecord,
    Recent,
    Submission,
    Writer,
    _split_runs,
    pack_recent,
    parse_recent,
    parse_settled,
)
from tests.store.reopening import EXPIRES_MS, KeptTables

Outcome = tuple[int, list[Submission], list[NewRecord], StoreError | None]


class Bench:
    """A writer with its tables, driven by hand."""

    def __init__(self, bytes_max: int = 64 << 20) -> None:
        self.tables = KeptTables(bytes_max)
        self.outcomes: list[Outcome] = []
        self.writer = Writer(
            self.tables,
            lambda *outcome: self.outcomes.append(outcome),
            first_commit=1,
            settled_commits=[],
            ack_try_seconds=0,
        )
        self.writer.recent_rows_from(1)

    def read(self) -> list[records.Record]:
        return [records.read(key, value) for key, value in self.tables.scan(Table.LOG, b"", b"\xff" * 16)]


def blobs_of(count: int, size: int = 10) -> list[bytes]:
    return [Message("trade", "pay", b"x" * size).encoded() for _ in range(count)]


def publishing(first: int, blobs: list[bytes], owners: tuple[int, ...] = (7,), topic: int = 1) -> Submission:
    one = Submission()
    one.appends.append(Append(Table.LOG, topic, first, blobs, [(len(blobs), owners)], 5, EXPIRES_MS + first))
    one.messages = len(blobs)
    return one


def settling(*triples: int) -> Submission:
    one = Submission(urgent=False)
    one.settled += triples
    return one


def test_appends_of_one_commit_that_follow_each_other_are_one_record() -> None:
    bench, blobs = Bench(), blobs_of(6)
    bench.writer._write([publishing(0, blobs[:2]), publishing(2, blobs[2:5], (7, 8)), publishing(5, blobs[5:])])
    (record,) = bench.read()
    assert record.blobs == blobs
    assert record.owners == [(7,), (7,), (7, 8), (7, 8), (7, 8), (7,)]
    assert record.expires_ms == EXPIRES_MS
    ((commit, _, new, error),) = bench.outcomes
    assert (commit, error) == (1, None)
    assert new == [NewRecord(1, 0, 9, EXPIRES_MS)]


def test_a_gap_or_another_topic_begins_a_record() -> None:
    bench, blobs = Bench(), blobs_of(4)
    bench.writer._write(
        [
            publishing(0, blobs[:1]),
            publishing(5, blobs[1:2]),
            publishing(0, blobs[2:3], topic=2),
            publishing(6, blobs[3:]),
        ]
    )
    places = [SEQUENCE_KEY.unpack(key) for key in bench.tables.keys(Table.LOG)]
    assert places == [(1, 0), (1, 5), (2, 0)]
    assert bench.read()[1].blobs == [blobs[1], blobs[3]]


@given(st.lists(st.integers(1, 400_000), min_size=1, max_size=12), st.integers(1, 12))
def test_records_are_split_at_their_size_and_lose_nothing(sizes: list[int], cut: int) -> None:
    bench = Bench()
    blobs = [Message("trade", "pay", bytes(size)).encoded() for size in sizes]
    parts = [publishing(0, blobs[:cut]), *([publishing(cut, blobs[cut:], (8, 9))] if blobs[cut:] else [])]
    bench.writer._write(parts)
    found = bench.read()
    assert [blob for record in found for blob in record.blobs] == blobs
    assert [number for record in found for number in record.sequences] == list(range(len(blobs)))
    owners = [owner for record in found for owner in record.owners]
    assert owners == [(7,)] * len(blobs[:cut]) + [(8, 9)] * len(blobs[cut:])
    for record in found:
        assert len(record.blobs) == 1 or sum(map(len, record.blobs)) <= RECORD_BYTES_MAX
    new = bench.outcomes[0][2]
    assert sum(record.owed for record in new) == sum(map(len, owners))


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([(1,), (2,)])), max_size=6), st.integers(0, 30))
def test_runs_are_split_where_messages_are(runs: list[records.Run], at: int) -> None:
    flat = [owners for messages, owners in runs for _ in range(messages)]
    left, right = ([owners for messages, owners in part for _ in range(messages)] for part in _split_runs(runs, at))
    assert (left, right) == (flat[:at], flat[at:])


def test_a_full_store_refuses_messages_and_keeps_acks() -> None:
    bench = Bench()
    bench.tables.failures = [StoreFull("full")]
    publish, ack = publishing(0, blobs_of(2)), settling(7, 3, 4)
    bench.writer._write([publish, ack])
    (_, refused, _, full), (_, kept, new, error) = bench.outcomes
    assert (refused, kept, new, error) == ([publish], [ack], [], None)
    assert isinstance(full, StoreFull)
    ((key, value),) = bench.tables.scan(Table.SETTLED, b"", b"\xff" * 8)
    assert parse_settled(key, value) == [(7, 3, 4)]
    assert bench.tables.keys(Table.LOG) == []


def test_acks_that_find_no_room_are_tried_again() -> None:
    bench = Bench()
    bench.tables.failures = [StoreFull("full"), StoreFull("full"), StoreFull("full")]
    bench.writer._write([publishing(0, blobs_of(1)), settling(7, 3, 4)])
    assert [type(outcome[3]) for outcome in bench.outcomes] == [StoreFull, type(None)]


def test_no_room_for_acks_for_long_ends_it() -> None:
    bench = Bench()
    bench.tables.failures = [StoreFull("full") for _ in range(ACK_TRIES + 2)]
    bench.writer._write([publishing(0, blobs_of(1)), settling(7, 3, 4)])
    assert isinstance(bench.outcomes[0][3], StoreFull)
    assert isinstance(bench.outcomes[1][3], StoreFailed)


def test_messages_are_refused_before_the_room_for_acks_is_taken() -> None:
    bench = Bench(bytes_max=1_000)
    bench.writer._write([publishing(0, blobs_of(1, size=100))])
    bench.writer._write([publishing(1, blobs_of(1, size=300)), settling(7, 0, 0)])
    assert [type(outcome[3]) for outcome in bench.outcomes] == [type(None), StoreFull, type(None)]


@pytest.mark.parametrize("failure", [StoreFailed("EIO"), RuntimeError("a defect")])
def test_after_a_failure_nothing_is_committed_any_more(failure: Exception) -> None:
    bench = Bench()
    bench.tables.failures = [failure]
    bench.writer._write([publishing(0, blobs_of(1))])
    bench.writer._write([settling(7, 0, 0)])
    assert all(isinstance(outcome[3], StoreFailed) for outcome in bench.outcomes)
    assert len(bench.outcomes) == 2
    assert bench.tables.applied == []


def test_a_snapshot_deletes_the_settlements_before_it_and_nothing_else() -> None:
    bench = Bench()
    for number in range(3):
        bench.writer._write([settling(7, number, number)])
        bench.writer._write([publishing(number, blobs_of(1))])
    snapshot = settling(7, 9, 9)
    snapshot.snapshot = True
    bench.writer._write([snapshot])
    deleted = [row for row in bench.tables.applied[-1] if row[2] is None]
    assert len(deleted) == 3
    assert len(bench.tables.keys(Table.SETTLED)) == 1, "its own commit's settlements stay"


def test_recent_rows_go_when_they_have_left_the_window() -> None:
    bench = Bench()
    for number in range(10):
        one = publishing(number, blobs_of(1))
        one.recent.append(Recent("shop", bytes(16), bytes(4)))
        bench.writer._write([one])
    assert len(bench.tables.keys(Table.RECENT)) == 10
    for _ in range(3):
        one = settling(7, 0, 0)
        one.recent_floor = 8
        bench.writer._write([one])
    assert [int.from_bytes(key, "big") for key in bench.tables.keys(Table.RECENT)] == [8, 9, 10]


def test_rows_of_ids_and_settlements_are_read_as_written_and_checked() -> None:
    key = (5).to_bytes(8, "big")
    recent = [Recent("shop", bytes(range(32)), b"12345678"), Recent("other", bytes(16), b"abcd")]
    value = pack_recent(key, recent, 1_700_000_000_000)
    assert parse_recent(key, value)[1] == recent
    for bad_key, bad in ((b"\0" * 8, value), (key, value[:-1] + b"!")):
        with pytest.raises(KiteQError):
            parse_recent(bad_key, bad)
        with pytest.raises(KiteQError):
            parse_settled(bad_key, bad)


class SlowTables(KeptTables):
    """Waits in the first commit until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def apply(self, rows: list[Row]) -> None:
        self.entered.set()
        self.go_on.wait(5)
        super().apply(rows)


def test_what_arrives_during_a_commit_shares_the_next_one() -> None:
    tables, outcomes = SlowTables(), list[Outcome]()
    writer = Writer(tables, lambda *outcome: outcomes.append(outcome), first_commit=1, settled_commits=[])
    thread = threading.Thread(target=writer.run)
    thread.start()
    blobs = blobs_of(5)
    writer.submit(publishing(0, blobs[:1]))
    assert tables.entered.wait(5)
    for number in range(1, 5):
        writer.submit(publishing(number, blobs[number : number + 1]))
    writer.submit(settling(7, 0, 0))
    tables.go_on.set()
    writer.stop()
    thread.join(5)
    assert not thread.is_alive()
    assert [len(outcome[1]) for outcome in outcomes] == [1, 5]
    assert len(tables.keys(Table.LOG)) == 2
