"""Sessions and connections of SQLAlchemy, sync and async, on all three databases."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from kiteq_client.decision import Decision
from kiteq_client.marker import AlreadyRolledBack, Marker, MarkRefused, StillInTransaction
from tests.marker.databases import Database, MariaDBDatabase, PostgresDatabase, SqliteDatabase, set_up
from tests.marker.schedule import Broker, FakeTransaction
from tests.marker.test_dbapi import AsyncTransaction, message_of

INSERT = text("INSERT INTO business (id) VALUES ('x')")
COUNT = text("SELECT COUNT(*) FROM business")
ASYNC_DRIVERS = ["sqlite+aiosqlite", "mysql+aiomysql", "postgresql+asyncpg", "postgresql+psycopg"]


def url(database: Database, driver: str) -> str:
    if isinstance(database, SqliteDatabase):
        return f"{driver}:///{database.path}"
    assert isinstance(database, MariaDBDatabase | PostgresDatabase)
    return database.server.url(driver, database.database)


@pytest.fixture
def engine(database: Database) -> Iterator[Engine]:
    drivers = {"sqlite": "sqlite", "mariadb": "mysql+pymysql", "postgres": "postgresql+psycopg"}
    engine = create_engine(url(database, drivers[database.name]))
    yield engine
    engine.dispose()


@pytest.fixture
def marker(engine: Engine) -> Iterator[Marker]:
    marker = Marker.for_engine(engine, lock_timeout=0)
    yield marker
    marker.close()


@pytest.fixture
def tx() -> FakeTransaction:
    return FakeTransaction(Broker(), os.urandom(16))


def test_a_session_commits_and_rolls_back_the_message(marker: Marker, engine: Engine) -> None:
    committed, rolled_back, left_open = (FakeTransaction(Broker(), os.urandom(16)) for _ in range(3))
    with Session(engine) as session:
        marker.mark(session, committed)
        assert marker.check_id(committed.id) is Decision.RUNNING
        session.commit()
        session.execute(COUNT)  # begins another transaction, which is none of the marker's business
        committed.leave()
        session.rollback()
        marker.mark(session, rolled_back)
        session.rollback()
        rolled_back.leave()
        marker.mark(session, left_open)
        with pytest.raises(StillInTransaction):
            left_open.leave()
    assert [tx.outcome for tx in (committed, rolled_back, left_open)] == ["committed", "rolled back", "unknown"]
    assert marker.check_id(committed.id) is Decision.COMMIT
    assert marker.check_id(left_open.id) is Decision.ROLLBACK


def test_a_connection_commits_the_message(marker: Marker, engine: Engine, tx: FakeTransaction) -> None:
    with engine.begin() as connection:
        connection.execute(INSERT)
        marker.mark(connection, tx)
        with pytest.raises(StillInTransaction):
            FakeTransaction.leave(tx)
    tx.outcome = "open"
    tx.leave()
    assert tx.outcome == "committed"


def test_a_scoped_session_is_a_session(marker: Marker, engine: Engine, tx: FakeTransaction) -> None:
    session = scoped_session(sessionmaker(engine))
    marker.mark(session, tx)
    session.commit()
    tx.leave()
    session.remove()
    assert tx.outcome == "committed"


def test_a_duplicate_rolls_the_session_back(marker: Marker, engine: Engine, tx: FakeTransaction) -> None:
    assert marker.check_id(tx.id) is Decision.ROLLBACK
    with Session(engine) as session:
        session.execute(INSERT)
        with pytest.raises(AlreadyRolledBack):
            marker.mark(session, tx)
        assert session.execute(COUNT).scalar() == 0
    with Session(engine) as session, pytest.raises(InvalidRequestError), session.begin():
        with pytest.raises(AlreadyRolledBack):
            marker.mark(session, tx)
        session.execute(INSERT)  # the block refuses what comes after
    with engine.connect() as connection:
        assert connection.execute(COUNT).scalar() == 0


def test_savepoints_are_refused(marker: Marker, engine: Engine, tx: FakeTransaction) -> None:
    refused = pytest.raises(MarkRefused, match="savepoint")
    with Session(engine) as session, session.begin(), session.begin_nested(), refused:
        marker.mark(session, tx)
    with engine.begin() as connection, connection.begin_nested(), pytest.raises(MarkRefused, match="savepoint"):
        marker.mark(connection, tx)
    with engine.connect() as connection, connection.begin():
        # As in test suites: the session lives in a savepoint of a connection that is given.
        session = Session(connection, join_transaction_mode="create_savepoint")
        with pytest.raises(MarkRefused, match="savepoint"):
            marker.mark(session, tx)
        session.close()


def test_a_marker_before_a_savepoint_survives_it(marker: Marker, engine: Engine, tx: FakeTransaction) -> None:
    with Session(engine) as session, session.begin():
        marker.mark(session, tx)
        with session.begin_nested() as savepoint:
            session.execute(INSERT)
            savepoint.rollback()
    tx.leave()
    assert tx.outcome == "committed"


def test_autocommit_is_refused(marker: Marker, engine: Engine, tx: FakeTransaction) -> None:
    automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(automatic) as session, pytest.raises(MarkRefused, match="autocommit"):
        marker.mark(session, tx)
    with automatic.connect() as connection, pytest.raises(MarkRefused, match="autocommit"):
        marker.mark(connection, tx)
    always = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with always.connect() as connection, pytest.raises(MarkRefused, match="autocommit"):
        marker.mark(connection, tx)
    always.dispose()
    assert marker.check_id(tx.id) is Decision.ROLLBACK


def test_a_session_of_a_given_connection_is_rolled_back_as_a_whole(
    marker: Marker, engine: Engine, tx: FakeTransaction
) -> None:
    marker.check_id(tx.id)
    with engine.connect() as connection:
        connection.execute(INSERT)
        session = Session(connection, join_transaction_mode="rollback_only")
        with pytest.raises(AlreadyRolledBack):
            marker.mark(session, tx)
        session.close()
        connection.rollback()
        assert connection.execute(COUNT).scalar() == 0


def test_our_own_connection_leaves_the_pool_as_it_was(marker: Marker, engine: Engine) -> None:
    small = create_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    own = Marker.for_engine(small, lock_timeout=2)
    assert own.check_id(os.urandom(16)) is Decision.ROLLBACK
    with small.connect() as connection:
        if engine.dialect.name in ("mysql", "mariadb"):
            waits, isolation = connection.execute(text("SELECT @@innodb_lock_wait_timeout, @@tx_isolation")).one()
            assert (waits, isolation) == (50, "REPEATABLE-READ")
        # The only connection of the pool is in use: ours does not wait for it, once it is there.
        if engine.dialect.name != "sqlite":
            assert own.check_id(os.urandom(16)) is Decision.ROLLBACK
    own.close()
    small.dispose()


def test_an_engine_whose_transactions_a_listener_begins(tmp_path: Path, tx: FakeTransaction) -> None:
    # As SQLAlchemy's documentation advises for SQLite.
    engine = create_engine(f"sqlite:///{tmp_path / 'listener.db'}")

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    marker = Marker.for_engine(engine, lock_timeout=0)
    marker.create_table()
    with Session(engine) as session:
        marker.mark(session, tx)
        session.commit()
    tx.leave()
    assert (tx.outcome, marker.check_id(os.urandom(16))) == ("committed", Decision.ROLLBACK)
    engine.dispose()


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(address: str) -> None:
    with pytest.raises(TypeError, match="connections of its own"):
        Marker.for_engine(create_engine(address))


# --- async -------------------------------------------------------------------------------------
def on_asyncio(
    work: Callable[[AsyncEngine, Marker], Coroutine[Any, Any, None]], database: Database, driver: str
) -> None:
    async def main() -> None:
        engine = create_async_engine(url(database, driver))
        marker = Marker.for_engine(engine, lock_timeout=0)
        try:
            await work(engine, marker)
        finally:
            await marker.aclose()
            await engine.dispose()

    asyncio.run(main())


@pytest.fixture(params=ASYNC_DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    driver: str = request.param
    return driver


@pytest.fixture
def database_of_driver(driver: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    database: Database
    if driver.startswith("sqlite"):
        database = SqliteDatabase(tmp_path / "async.db")
    elif driver.startswith("mysql"):
        database = MariaDBDatabase(request.getfixturevalue("mariadb"))
    else:
        database = PostgresDatabase(request.getfixturevalue("postgres"))
    set_up(database)
    yield database
    database.close()


def test_an_async_session_commits_and_rolls_back_the_message(database_of_driver: Database, driver: str) -> None:
    async def work(engine: AsyncEngine, marker: Marker) -> None:
        committed, rolled_back, left_open, late = (AsyncTransaction(Broker(), os.urandom(16)) for _ in range(4))
        async with AsyncSession(engine) as session:
            await marker.amark(session, committed)
            assert await marker.check(message_of(committed)) is Decision.RUNNING
            await session.commit()
            await committed.aleave()
            await marker.amark(session, rolled_back)
            await session.rollback()
            await rolled_back.aleave()
            await marker.amark(session, left_open)
            with pytest.raises(StillInTransaction):
                await left_open.aleave()
        assert [tx.outcome for tx in (committed, rolled_back)] == ["committed", "rolled back"]
        assert await marker.check(message_of(committed)) is Decision.COMMIT
        assert await marker.check(message_of(left_open)) is Decision.ROLLBACK
        assert await marker.check(message_of(late)) is Decision.ROLLBACK
        async with engine.begin() as connection:
            await connection.execute(INSERT)
            with pytest.raises(AlreadyRolledBack):
                await marker.amark(connection, late)
        async with AsyncSession(engine) as session:
            assert (await session.execute(COUNT)).scalar() == 0

    on_asyncio(work, database_of_driver, driver)


def test_an_async_session_in_a_savepoint_or_in_autocommit_is_refused(database_of_driver: Database, driver: str) -> None:
    async def work(engine: AsyncEngine, marker: Marker) -> None:
        tx = AsyncTransaction(Broker(), os.urandom(16))
        async with AsyncSession(engine) as session, session.begin(), session.begin_nested():
            with pytest.raises(MarkRefused, match="savepoint"):
                await marker.amark(session, tx)
        automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with AsyncSession(automatic) as session:
            with pytest.raises(MarkRefused, match="autocommit"):
                await marker.amark(session, tx)
        assert await marker.check(message_of(tx)) is Decision.ROLLBACK

    on_asyncio(work, database_of_driver, driver)


def test_the_table_of_an_async_engine_is_cared_for(database_of_driver: Database, driver: str) -> None:
    async def work(engine: AsyncEngine, marker: Marker) -> None:
        other = Marker.for_engine(engine, table="another")
        await other.acreate_table()
        tx = AsyncTransaction(Broker(), os.urandom(16))
        async with engine.begin() as connection:
            await other.amark(connection, tx)
        await other.decided(tx.id, Decision.COMMIT)
        assert await other.aleft_over() == []
        assert await other.check(message_of(tx)) is Decision.ROLLBACK  # the marker is gone
        assert await other.apurge() == 0
        await other.aclose()
        with pytest.raises(TypeError, match="async engine"):
            other.create_table()

    on_asyncio(work, database_of_driver, driver)


def test_sync_and_async_are_not_mixed_up(database_of_driver: Database, driver: str) -> None:
    async def work(engine: AsyncEngine, marker: Marker) -> None:
        tx = AsyncTransaction(Broker(), os.urandom(16))
        async with AsyncSession(engine) as session:
            with pytest.raises(TypeError, match="amark"):
                marker.mark(session, tx)
            with pytest.raises(TypeError, match="use mark"):
                await marker.amark(session.sync_session, tx)

    on_asyncio(work, database_of_driver, driver)
