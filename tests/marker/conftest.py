"""One server of each kind for the tests of a worker, and a fresh database for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.marker.databases import Database, MariaDBDatabase, PostgresDatabase, SqliteDatabase, set_up
from tests.support.mariadb import MariaDB
from tests.support.postgres import PostgreSQL


@pytest.fixture(scope="session")
def mariadb() -> Iterator[MariaDB]:
    with MariaDB() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSQL]:
    with PostgreSQL() as server:
        yield server


@pytest.fixture(params=["sqlite", "mariadb", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    made: Database
    if request.param == "sqlite":
        made = SqliteDatabase(tmp_path / "shop.db")
    elif request.param == "mariadb":
        made = MariaDBDatabase(request.getfixturevalue("mariadb"))
    else:
        made = PostgresDatabase(request.getfixturevalue("postgres"))
    set_up(made)
    yield made
    made.close()
