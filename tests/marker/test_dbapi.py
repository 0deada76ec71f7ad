"""Connections of the drivers: what is refused, what a duplicate does, and what leaving the block sees."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from kiteq.message import Message, decode
from kiteq_client.decision import Decision
from kiteq_client.marker import AlreadyRolledBack, Marker, MarkRefused, StillInTransaction
from tests.marker.databases import Database, PostgresDatabase, SqliteDatabase, execute, set_up
from tests.marker.schedule import Broker, FakeTransaction, Kind, Scenarios

COUNT = "SELECT COUNT(*) FROM business"
INSERT = "INSERT INTO business (id) VALUES ('x')"


@pytest.fixture
def marker(database: Database) -> Iterator[Marker]:
    marker = Marker(database.own, lock_timeout=0)
    yield marker
    marker.close()


@pytest.fixture
def connection(database: Database) -> Iterator[Any]:
    connection = database.connect(waits=False)
    yield connection
    connection.close()


@pytest.fixture
def tx() -> FakeTransaction:
    return FakeTransaction(Broker(), os.urandom(16))


class AsyncTransaction(FakeTransaction):
    async def commit(self) -> None:  # type: ignore[override]
        super().commit()

    async def rollback(self) -> None:  # type: ignore[override]
        super().rollback()

    async def aleave(self) -> None:
        for hook in self._hooks:
            await hook()
        if self.outcome == "open":
            await self.commit()


def autocommit(connection: Any) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.isolation_level = None
    elif callable(connection.autocommit):
        connection.autocommit(True)
    else:
        connection.autocommit = True


def message_of(tx: FakeTransaction) -> Any:
    return decode(Message("trade", "paid", b"", id=tx.id).encoded(), "group", 1)


# --- leaving -----------------------------------------------------------------------------------
def test_a_committed_row_commits_the_message(marker: Marker, connection: Any, tx: FakeTransaction) -> None:
    marker.mark(connection, tx)
    connection.commit()
    tx.leave()
    assert (tx.outcome, marker.check_id(tx.id)) == ("committed", Decision.COMMIT)


def test_a_transaction_rolled_back_inside_the_block_rolls_the_message_back(
    marker: Marker, connection: Any, tx: FakeTransaction
) -> None:
    marker.mark(connection, tx)
    connection.rollback()
    tx.leave()
    assert (tx.outcome, marker.check_id(tx.id)) == ("rolled back", Decision.ROLLBACK)


def test_leaving_inside_the_transaction_raises_and_decides_nothing(
    marker: Marker, connection: Any, tx: FakeTransaction
) -> None:
    marker.mark(connection, tx)
    with pytest.raises(StillInTransaction):
        tx.leave()
    assert (tx.outcome, marker.check_id(tx.id)) == ("unknown", Decision.RUNNING)
    connection.commit()
    assert marker.check_id(tx.id) is Decision.COMMIT


def test_a_connection_that_works_on_after_the_commit_does_no_harm(
    marker: Marker, connection: Any, tx: FakeTransaction
) -> None:
    # As in a pool, which lends it to somebody else before the block is left.
    marker.mark(connection, tx)
    connection.commit()
    execute(connection, INSERT)
    tx.leave()
    assert tx.outcome == "committed"


def test_closing_the_connection_rolls_the_message_back(marker: Marker, database: Database, tx: FakeTransaction) -> None:
    connection = database.connect()
    marker.mark(connection, tx)
    connection.close()
    while tx.outcome in ("open", "unknown"):
        # The server may take a moment to notice.
        tx.outcome = "open"
        tx.leave()
    assert tx.outcome == "rolled back"


async def test_the_async_client_leaves_the_same_way(marker: Marker, connection: Any) -> None:
    committed, rolled_back, still_open = (AsyncTransaction(Broker(), os.urandom(16)) for _ in range(3))
    marker.mark(connection, committed)
    connection.commit()
    await committed.aleave()
    marker.mark(connection, rolled_back)
    connection.rollback()
    await rolled_back.aleave()
    marker.mark(connection, still_open)
    with pytest.raises(StillInTransaction):
        await still_open.aleave()
    assert [tx.outcome for tx in (committed, rolled_back, still_open)] == ["committed", "rolled back", "open"]
    assert await marker.check(message_of(still_open)) is Decision.RUNNING
    connection.rollback()
    assert await marker.check(message_of(committed)) is Decision.COMMIT


def test_a_database_that_fails_while_leaving_leaves_it_to_the_checks(
    database: Database, connection: Any, tx: FakeTransaction, caplog: pytest.LogCaptureFixture
) -> None:
    def no_connection() -> Any:
        raise OSError("the database is away")

    marker = Marker(no_connection)
    marker.mark(connection, tx)
    connection.commit()
    with caplog.at_level(logging.WARNING):
        tx.leave()
    assert tx.outcome == "unknown"
    assert "undecided until the broker asks" in caplog.text
    assert marker.check_id(tx.id) is Decision.UNKNOWN


# --- duplicates --------------------------------------------------------------------------------
def test_a_duplicate_rolls_the_transaction_back_before_it_raises(
    marker: Marker, connection: Any, tx: FakeTransaction
) -> None:
    assert marker.check_id(tx.id) is Decision.ROLLBACK
    execute(connection, INSERT)
    with pytest.raises(AlreadyRolledBack, match=tx.id.hex()):
        marker.mark(connection, tx)
    assert tuple(execute(connection, COUNT)[0]) == (0,)
    connection.rollback()
    with pytest.raises(AlreadyRolledBack):
        tx.leave()  # the error was caught: it is raised again
    assert tx.outcome == "unknown"


def test_a_retry_after_a_rollback_marks_again(marker: Marker, connection: Any, tx: FakeTransaction) -> None:
    marker.mark(connection, tx)
    connection.rollback()
    marker.mark(connection, tx)
    connection.commit()
    tx.leave()
    assert tx.outcome == "committed"


def test_an_insert_that_fails_rolls_the_transaction_back(database: Database, connection: Any, tx: Any) -> None:
    marker = Marker(database.own, table="missing")
    execute(connection, INSERT)
    with pytest.raises(Exception, match="missing"):
        marker.mark(connection, tx)
    assert tuple(execute(connection, COUNT)[0]) == (0,)
    assert marker.check_id(tx.id) is Decision.UNKNOWN


# --- refusals ----------------------------------------------------------------------------------
def test_autocommit_is_refused(marker: Marker, connection: Any, tx: FakeTransaction) -> None:
    connection.rollback()
    autocommit(connection)
    with pytest.raises(MarkRefused, match="autocommit"):
        marker.mark(connection, tx)
    assert marker.check_id(tx.id) is Decision.ROLLBACK


def test_a_transaction_begun_by_sql_in_autocommit_is_accepted(
    marker: Marker, connection: Any, tx: FakeTransaction
) -> None:
    connection.rollback()
    autocommit(connection)
    execute(connection, "BEGIN")
    marker.mark(connection, tx)
    execute(connection, "COMMIT")
    tx.leave()
    assert tx.outcome == "committed"


def test_postgresql_shows_savepoints(postgres: Any, tx: FakeTransaction) -> None:
    with postgres.connect() as connection:
        marker = Marker(postgres.connect, table="pg_savepoints")
        marker.create_table()
        execute(connection, "SAVEPOINT a")
        with pytest.raises(MarkRefused, match="savepoint"):
            marker.mark(connection, tx)
        assert connection.info.transaction_status == 0
        execute(connection, "SAVEPOINT a")
        execute(connection, "RELEASE SAVEPOINT a")
        again = FakeTransaction(tx._broker, os.urandom(16))
        marker.mark(connection, again)
        connection.commit()
        again.leave()
        assert again.outcome == "committed"
        marker.close()


def test_blocks_of_psycopg_are_transactions(postgres: Any) -> None:
    marker = Marker(postgres.connect, table="pg_blocks")
    marker.create_table()
    with postgres.connect(autocommit=True) as connection:
        tx = FakeTransaction(Broker(), os.urandom(16))
        with connection.transaction():
            marker.mark(connection, tx)
        tx.leave()
        assert tx.outcome == "committed"
        late = FakeTransaction(Broker(), os.urandom(16))
        marker.check_id(late.id)
        with pytest.raises(AlreadyRolledBack), connection.transaction():
            marker.mark(connection, late)
        assert connection.info.transaction_status == 0
        with pytest.raises(MarkRefused), connection.transaction(), connection.transaction():
            marker.mark(connection, FakeTransaction(Broker(), os.urandom(16)))
    marker.close()


def test_sqlite_with_its_newer_transaction_control(tmp_path: Path) -> None:
    # On Python 3.11, which has only the older one, this is one more test of that.
    newer: dict[str, Any] = {"autocommit": False} if sys.version_info >= (3, 12) else {}
    path = tmp_path / "new.db"
    marker = Marker(lambda: sqlite3.connect(path, **newer), lock_timeout=0)
    marker.create_table()
    connection = sqlite3.connect(path, **newer)
    committed, rolled_back, still_open = (FakeTransaction(Broker(), os.urandom(16)) for _ in range(3))
    marker.mark(connection, committed)
    connection.commit()
    committed.leave()
    marker.mark(connection, rolled_back)
    connection.rollback()
    rolled_back.leave()
    marker.mark(connection, still_open)
    with pytest.raises(StillInTransaction):
        still_open.leave()
    connection.close()
    assert [tx.outcome for tx in (committed, rolled_back)] == ["committed", "rolled back"]


@pytest.mark.parametrize("wrong", [None, object(), "shop.db"])
def test_another_connection_is_refused(marker: Marker, tx: FakeTransaction, wrong: object) -> None:
    with pytest.raises(TypeError, match="sqlite3, pymysql and psycopg"):
        marker.mark(wrong, tx)


def test_values_out_of_range_are_refused(database: Database) -> None:
    for table in ("", "a b", "a;b", "1a", "a.b.c", 'a"'):
        with pytest.raises(ValueError, match="name of a table"):
            Marker(database.own, table=table)
    for timeout in (-1.0, 2.1):
        with pytest.raises(ValueError, match="lock_timeout"):
            Marker(database.own, lock_timeout=timeout)


# --- the table ---------------------------------------------------------------------------------
async def test_a_marker_goes_with_the_decision_and_a_tombstone_with_its_age(
    database: Database, marker: Marker, connection: Any
) -> None:
    committed, undecided = (FakeTransaction(Broker(), os.urandom(16)) for _ in range(2))
    for tx in (committed, undecided):
        marker.mark(connection, tx)
        connection.commit()
    tombstone = os.urandom(16)
    assert marker.check_id(tombstone) is Decision.ROLLBACK
    await marker.decided(tombstone, Decision.ROLLBACK)
    await marker.decided(committed.id, Decision.COMMIT)
    rows = {str(row[0]): row[1] for row in execute(connection, "SELECT id, kind FROM kiteq_marker")}
    connection.rollback()
    assert rows == {undecided.id.hex(): "marker", tombstone.hex(): "tombstone"}
    assert marker.left_over() == []
    assert marker.left_over(timedelta(seconds=-1)) == [undecided.id]
    assert marker.purge() == 0
    assert marker.purge(timedelta(seconds=-1)) == 1
    marker.forget(undecided.id)
    assert tuple(execute(connection, "SELECT COUNT(*) FROM kiteq_marker")[0]) == (0,)
    connection.rollback()


async def test_decided_markers_are_deleted_many_at_a_time(marker: Marker, connection: Any) -> None:
    ids = [os.urandom(16) for _ in range(250)]
    for message in ids:
        marker.mark(connection, FakeTransaction(Broker(), message))
    connection.commit()
    for message in ids:
        await marker.decided(message, Decision.COMMIT)
    await marker.aclose()
    assert await marker.aleft_over(timedelta(seconds=-1)) == []


def test_many_tombstones_are_purged_in_steps(marker: Marker, connection: Any) -> None:
    rows = ", ".join(f"('{os.urandom(16).hex()}', 'tombstone', {number})" for number in range(1_234))
    execute(connection, f"INSERT INTO kiteq_marker (id, kind, written_ms) VALUES {rows}")
    connection.commit()
    undecided = FakeTransaction(Broker(), os.urandom(16))
    if not isinstance(connection, sqlite3.Connection):
        marker.mark(connection, undecided)  # an open transaction does not stop it
    assert marker.purge() == 1_234
    connection.rollback()


def test_the_statement_for_migrations_makes_the_same_table(database: Database, connection: Any) -> None:
    names = {"sqlite": "sqlite", "mariadb": "mariadb", "postgres": "postgresql"}
    marker = Marker(database.own, table="by_migration")
    execute(connection, marker.create_sql(names[database.name]))
    connection.commit()
    assert marker.check_id(os.urandom(16)) is Decision.ROLLBACK
    marker.close()
    with pytest.raises(TypeError, match="oracle"):
        marker.create_sql("oracle")


# --- our own connections -----------------------------------------------------------------------
def test_a_check_waits_no_longer_than_its_timeout_for_an_open_transaction(database: Database, connection: Any) -> None:
    marker = Marker(database.own, lock_timeout=2)
    marker.mark(connection, tx := FakeTransaction(Broker(), os.urandom(16)))
    thread = threading.Timer(0.1, connection.commit)
    thread.start()
    assert marker.check_id(tx.id) is Decision.COMMIT  # it waited, and saw the end
    thread.join()
    marker.close()


def test_a_connection_that_the_server_ended_is_replaced(postgres: Any) -> None:
    database = PostgresDatabase(postgres)
    opened = []

    def own() -> Any:
        opened.append(database.own())
        return opened[-1]

    marker = Marker(own)
    marker.create_table()
    database.kill(opened[0])
    answers = [marker.check_id(os.urandom(16)) for _ in range(3)]
    assert answers == [Decision.UNKNOWN, Decision.ROLLBACK, Decision.ROLLBACK]
    assert len(opened) == 2
    marker.close()
    database.close()


def test_a_forked_process_opens_connections_of_its_own(postgres: Any) -> None:
    database = PostgresDatabase(postgres)
    marker = Marker(database.own)
    marker.create_table()
    message = os.urandom(16)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if marker.check_id(message) is Decision.ROLLBACK else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert marker.check_id(message) is Decision.ROLLBACK
    marker.close()
    database.close()


def test_importing_the_marker_loads_no_driver() -> None:
    program = (
        "import sys, kiteq_client.marker; names = ('pymysql', 'psycopg', 'sqlalchemy', 'django', 'trio', 'lmdb'); "
        "print([name for name in names if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"


def test_sqlite_in_the_older_journal_mode(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "delete.db", "DELETE")
    set_up(database)
    Scenarios(database, Marker(database.own, lock_timeout=0), 3).run(list(Kind) * 20)
