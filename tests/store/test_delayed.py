"""The table of delayed messages: in order of their time, one row for a batch, and damage kept to itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kiteq.limits import MIB, RECORD_BYTES_MAX
from kiteq.message import Message
from kiteq.store import delayed
from kiteq.store.lmdb import LmdbTables
from kiteq.store.memory import MemoryTables
from kiteq.store.records import DamagedRecord
from kiteq.store.tables import Table, Tables

BYTES_MAX = 64 * MIB


@pytest.fixture(params=["lmdb", "memory"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tables]:
    opened: Tables = MemoryTables(BYTES_MAX) if request.param == "memory" else LmdbTables(tmp_path / "data", BYTES_MAX)
    yield opened
    opened.close()


def blobs_of(*bodies: str) -> list[bytes]:
    return [Message("t", "a", body).encoded() for body in bodies]


def bodies_of(rows: list[tuple[bytes, bytes]]) -> list[str]:
    read = [delayed.read_row(key, value) for key, value in rows]
    return [blob[-5:-4].decode() for pending in read for blob in pending.blobs]


def rows_in(tables: Tables) -> list[tuple[bytes, bytes]]:
    return tables.scan(Table.DELAYED, b"", delayed.KEYS_END)


def test_the_messages_of_a_batch_that_are_due_together_share_a_row(tables: Tables) -> None:
    by_due = {2_000: blobs_of("a", "b", "c"), 1_000: blobs_of("d")}
    tables.apply(delayed.build_rows("shop", by_due, 7, 500))
    (early, late) = rows_in(tables)
    assert [delayed.due_ms_of(key) for key, _ in (early, late)] == [1_000, 2_000]
    assert [delayed.number_of(key) for key, _ in (early, late)] == [10, 7]
    assert delayed.read_row(*late) == delayed.Pending("shop", by_due[2_000], 500, damaged=False)
    assert delayed.size_of(*late) == (late[0], 3, len(late[1]))


def test_rows_come_in_the_order_of_their_time_and_then_of_their_writing(tables: Tables) -> None:
    number = 1 << 40
    for due_ms, body in ((3_000, "c"), (1_000, "a"), (2_000, "b"), (1_000, "A"), (1 << 41, "z")):
        tables.apply(delayed.build_rows("shop", {due_ms: blobs_of(body)}, number, 5))
        number += 1
    assert bodies_of(rows_in(tables)) == ["a", "A", "b", "c", "z"]
    assert delayed.first_due(tables) == 1_000


def test_what_is_due_is_read_up_to_a_size_and_the_next_time_is_told(tables: Tables) -> None:
    assert delayed.read_due(tables, 10_000, 1_000) == ([], None)
    assert delayed.first_due(tables) is None
    for number, due_ms in enumerate((10, 20, 30, 40)):
        tables.apply(delayed.build_rows("shop", {due_ms: blobs_of(str(number))}, number, 5))
    due = delayed.read_due(tables, 30, 1_000_000)
    assert (bodies_of(due.rows), due.next_ms) == (["0", "1", "2"], 40)
    due = delayed.read_due(tables, 9, 1_000_000)
    assert (due.rows, due.next_ms) == ([], 10)
    due = delayed.read_due(tables, 30, 1)
    assert (bodies_of(due.rows), due.next_ms) == (["0"], 30), "there may be more, so look again at once"
    due = delayed.read_due(tables, 40, 1_000_000)
    assert (len(due.rows), due.next_ms) == (4, None)


def test_a_batch_larger_than_a_record_is_split_and_keeps_its_order(tables: Tables) -> None:
    big = [Message("t", "a", bytes(RECORD_BYTES_MAX // 3) + b"%d" % number).encoded() for number in range(7)]
    huge = Message("t", "a", bytes(2 * RECORD_BYTES_MAX) + b"7").encoded()
    tables.apply(delayed.build_rows("shop", {9: [*big, huge]}, 0, 5))
    rows = rows_in(tables)
    assert [delayed.size_of(*row).messages for row in rows] == [2, 2, 2, 1, 1]
    assert bodies_of(rows) == list("01234567")
    assert len({key for key, _ in rows}) == 5


def test_a_flipped_byte_is_noticed_and_costs_at_most_its_message() -> None:
    blobs = blobs_of("a", "b")
    ((_, key, value),) = delayed.build_rows("shop", {9: blobs}, 3, 5)
    assert value is not None
    for place in range(len(value)):
        broken = value[:place] + bytes([value[place] ^ 0xFF]) + value[place + 1 :]
        try:
            pending = delayed.read_row(key, broken)
        except DamagedRecord:
            assert place < len(value) - len(blobs[0]) - len(blobs[1]), "the head alone decides"
            assert delayed.size_of(key, broken).messages == 0
            continue
        assert (pending.damaged, len(pending.blobs)) == (True, 1)
        assert pending.blobs[0] in blobs


def test_a_row_under_another_key_is_damaged() -> None:
    ((_, key, value),) = delayed.build_rows("shop", {9: blobs_of("a")}, 3, 5)
    assert value is not None
    other = key[:-1] + b"\x04"
    with pytest.raises(DamagedRecord):
        delayed.read_row(other, value)


def test_a_message_is_found_and_taken_out_and_its_neighbours_stay(tables: Tables) -> None:
    blobs = blobs_of("a", "b", "c")
    tables.apply(delayed.build_rows("shop", {8: blobs_of("x"), 9: blobs}, 3, 5))
    found = delayed.find(tables, blobs[1][:16], b"", 1 << 20)
    (key,) = found.keys
    value = tables.get(Table.DELAYED, key)
    assert value is not None
    assert found.after == key
    assert delayed.find(tables, blobs[1][:16], key, 1 << 20) == ([], None)
    assert delayed.without(key, value, blobs[1][:16], "other").messages == 0
    taken = delayed.without(key, value, blobs[1][:16], "shop")
    tables.apply(taken.rows)
    left = tables.get(Table.DELAYED, key)
    assert left is not None
    assert delayed.read_row(key, left) == delayed.Pending("shop", [blobs[0], blobs[2]], 5, damaged=False)
    assert (taken.messages, taken.size) == (1, len(value) - len(left))


def test_a_search_looks_at_one_piece_after_the_other(tables: Tables) -> None:
    blobs = blobs_of("a", "b", "c")
    for number, blob in enumerate(blobs):
        tables.apply(delayed.build_rows("shop", {9: [blob]}, number, 5))
    keys = [key for key, _ in rows_in(tables)]
    assert delayed.find(tables, blobs[2][:16], b"", 1) == ([], keys[0])
    assert delayed.find(tables, blobs[2][:16], keys[0], 1) == ([], keys[1])
    assert delayed.find(tables, blobs[2][:16], keys[1], 1) == ([keys[2]], keys[2])
    assert [row.messages for row in delayed.sizes(tables, keys[0], 1 << 20)] == [1, 1]


def test_the_last_message_of_a_row_takes_the_row_along(tables: Tables) -> None:
    (blob,) = blobs_of("a")
    tables.apply(delayed.build_rows("shop", {9: [blob]}, 3, 5))
    ((key, value),) = rows_in(tables)
    taken = delayed.without(key, value, blob[:16], None)
    tables.apply(taken.rows)
    assert (rows_in(tables), taken.messages, taken.size) == ([], 1, len(value))


def test_taking_a_message_out_of_a_damaged_row_keeps_the_row_in_quarantine(tables: Tables) -> None:
    blobs = blobs_of("a", "b", "c")
    ((_, key, value),) = delayed.build_rows("shop", {9: blobs}, 3, 5)
    assert value is not None
    broken = value[:-6] + b"?" + value[-5:]
    tables.apply([(Table.DELAYED, key, broken)])
    tables.apply(delayed.without(key, broken, blobs[0][:16], None).rows)
    assert tables.get(Table.QUARANTINE, key) == broken
    ((_, left),) = rows_in(tables)
    assert delayed.read_row(key, left).blobs == [blobs[1]]
