"""The contract of storage engines: ordered tables, changed in atomic, durable steps."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kiteq.errors import StoreFull, StoreUnusable
from kiteq.limits import MIB
from kiteq.store.lmdb import LmdbTables
from kiteq.store.memory import MemoryTables
from kiteq.store.recovery import recover
from kiteq.store.tables import Row, Table, Tables

END = b"\xff" * 16
BYTES_MAX = 4 * MIB


@pytest.fixture(params=["lmdb", "memory"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tables]:
    opened: Tables = MemoryTables(BYTES_MAX) if request.param == "memory" else LmdbTables(tmp_path / "data", BYTES_MAX)
    yield opened
    opened.close()


def key_of(number: int) -> bytes:
    return number.to_bytes(8, "big")


def test_rows_come_back_in_the_order_of_their_keys(tables: Tables) -> None:
    for number in (5, 1, 300, 2, 70_000):
        tables.apply([(Table.LOG, key_of(number), b"%d" % number)])
    assert [int(value) for _, value in tables.scan(Table.LOG, b"", END)] == [1, 2, 5, 300, 70_000]
    assert tables.get(Table.LOG, key_of(300)) == b"300"
    assert tables.get(Table.LOG, key_of(3)) is None
    assert tables.get(Table.META, key_of(300)) is None, "tables are apart"


def test_a_scan_takes_start_and_leaves_out_end(tables: Tables) -> None:
    tables.apply([(Table.LOG, key_of(number), b"x" * 10) for number in range(10)])
    found = tables.scan(Table.LOG, key_of(3), key_of(7))
    assert [int.from_bytes(key, "big") for key, _ in found] == [3, 4, 5, 6]
    assert tables.scan(Table.LOG, key_of(7), key_of(7)) == []
    assert tables.scan(Table.LOG, key_of(10), END) == []


@pytest.mark.parametrize(("bytes_max", "rows"), [(1, 1), (10, 1), (11, 2), (20, 2), (1_000, 10)])
def test_a_scan_stops_after_the_row_that_reaches_its_bytes(tables: Tables, bytes_max: int, rows: int) -> None:
    tables.apply([(Table.LOG, key_of(number), b"x" * 10) for number in range(10)])
    assert len(tables.scan(Table.LOG, b"", END, bytes_max=bytes_max)) == rows


def test_rows_of_one_step_are_written_in_order(tables: Tables) -> None:
    key = key_of(1)
    tables.apply([(Table.LOG, key, b"first"), (Table.LOG, key, None), (Table.LOG, key, b"last")])
    assert tables.get(Table.LOG, key) == b"last"
    tables.apply([(Table.LOG, key, b"again"), (Table.LOG, key, None), (Table.LOG, key_of(9), None)])
    assert tables.scan(Table.LOG, b"", END) == []


def test_a_full_engine_leaves_everything_as_it_was_and_goes_on(tables: Tables) -> None:
    tables.apply([(Table.LOG, key_of(1), b"kept"), (Table.META, b"a", b"1")])
    with pytest.raises(StoreFull):
        tables.apply([(Table.META, b"a", b"2"), (Table.LOG, key_of(1), None), (Table.LOG, key_of(2), bytes(BYTES_MAX))])
    assert tables.scan(Table.LOG, b"", END) == [(key_of(1), b"kept")]
    assert tables.get(Table.META, b"a") == b"1"
    tables.apply([(Table.META, b"a", b"2")])
    assert tables.get(Table.META, b"a") == b"2"


def test_deleting_makes_room_again(tables: Tables) -> None:
    big = bytes(BYTES_MAX // 4)
    for _ in range(20):
        tables.apply([(Table.LOG, key_of(1), big)])
        tables.apply([(Table.LOG, key_of(1), None)])
        tables.apply([(Table.META, b"a", b"1")])


def test_a_step_that_deletes_more_than_it_writes_fits_a_full_memory() -> None:
    tables, number = MemoryTables(BYTES_MAX), 0
    with pytest.raises(StoreFull):
        while True:
            tables.apply([(Table.LOG, key_of(number), bytes(1_000))])
            number += 1
    tables.apply([(Table.SETTLED, key_of(1), bytes(900)), (Table.LOG, key_of(0), None)])
    assert tables.get(Table.LOG, key_of(0)) is None


def test_usage_grows_and_shrinks(tables: Tables) -> None:
    empty = tables.usage()
    assert empty.limit == BYTES_MAX
    tables.apply([(Table.LOG, key_of(1), bytes(MIB))])
    full = tables.usage()
    assert full.used >= empty.used + MIB
    tables.apply([(Table.LOG, key_of(1), None)])
    tables.apply([(Table.META, b"a", b"1")])
    assert tables.usage().used < full.used - MIB // 2
    assert 0 < full.disk_free <= full.disk_size


def test_other_threads_read_whole_steps_while_one_writes(tables: Tables) -> None:
    stop, torn = threading.Event(), list[object]()

    def read() -> None:
        while not stop.is_set():
            rows = tables.scan(Table.LOG, b"", END)
            if len({value for _, value in rows}) > 1 or len(rows) not in (0, 5):
                torn.append(rows)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(30):
        tables.apply([(Table.LOG, key_of(number), b"%d" % step) for number in range(5)])
    stop.set()
    for reader in readers:
        reader.join(5)
    assert torn == []


# --- LMDB alone ---------------------------------------------------------------------------------


def test_what_was_written_is_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    rows: list[Row] = [(table, b"key", table.name.encode()) for table in Table]
    first = LmdbTables(tmp_path / "data", BYTES_MAX)
    first.apply(rows)
    first.close()
    again = LmdbTables(tmp_path / "data", BYTES_MAX)
    assert [again.get(table, b"key") for table in Table] == [table.name.encode() for table in Table]
    again.close()


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    first = LmdbTables(tmp_path, BYTES_MAX)
    with pytest.raises(StoreUnusable, match=r"another broker owns the store's folder .*--db"):
        LmdbTables(tmp_path, BYTES_MAX)
    first.apply([(Table.META, b"a", b"1")])
    first.close()
    LmdbTables(tmp_path, BYTES_MAX).close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable, match="cannot be made"):
        LmdbTables(tmp_path / "file" / "data", BYTES_MAX)


@pytest.mark.parametrize("content", [b"not an LMDB file, but long enough to be one" * 200, b"short"])
def test_a_foreign_file_is_refused_and_the_lock_given_back(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    for _ in range(2):
        with pytest.raises(StoreUnusable, match=r"is not an LMDB file|cut short"):
            LmdbTables(tmp_path, BYTES_MAX)
    assert (tmp_path / "data.mdb").read_bytes() == content


def test_a_truncated_file_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    tables = LmdbTables(tmp_path, BYTES_MAX)
    tables.apply([(Table.LOG, key_of(1), bytes(MIB))])
    tables.close()
    os.truncate(tmp_path / "data.mdb", 200_000)
    with pytest.raises(StoreUnusable, match="cut short: 200000 bytes where"):
        LmdbTables(tmp_path, BYTES_MAX)


@pytest.mark.parametrize(("version", "advice"), [(b"3", "upgrade kiteq"), (b"0", "open it once with the kiteq")])
def test_another_format_is_refused(version: bytes, advice: str) -> None:
    tables = MemoryTables(BYTES_MAX)
    tables.apply([(Table.META, b"format", version)])
    with pytest.raises(StoreUnusable, match=advice):
        recover(tables)
    assert tables.scan(Table.META, b"", END) == [(b"format", version)], "nothing was changed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_refuses_messages_and_gives_up_the_reserve_for_acks(small_disk: Path) -> None:
    tables = LmdbTables(small_disk / "data", 1_000 * MIB)
    reserve = small_disk / "data" / "reserve"
    assert reserve.stat().st_blocks * 512 >= 64 * MIB
    written = 0
    with pytest.raises(StoreFull, match="is full"):
        while True:
            tables.apply([(Table.LOG, key_of(written), bytes(MIB))])
            written += 1
    assert not reserve.exists()
    assert len(tables.scan(Table.LOG, b"", END)) == written
    tables.apply([(Table.SETTLED, key_of(1), bytes(1_000)), (Table.LOG, key_of(0), None)])
    assert tables.get(Table.LOG, key_of(0)) is None
    tables.close()
