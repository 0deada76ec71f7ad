"""The three databases as the tests of the marker see them, with connections that pause before each statement."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pymysql
import pymysql.connections

from kiteq_client.marker import Marker
from tests.support.mariadb import MariaDB
from tests.support.postgres import PostgreSQL

__all__ = ["Database", "MariaDBDatabase", "PostgresDatabase", "SqliteDatabase", "pausing"]


class _Pause:
    """What happens before each statement of a pausing connection: nothing, outside of a schedule."""

    def __init__(self) -> None:
        self.hook: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.hook is not None:
            self.hook()


pausing = _Pause()


class PausingSqlite(sqlite3.Connection):
    def cursor(self, *arguments: Any, **options: Any) -> Any:
        pausing()
        return super().cursor(*arguments, **options)


class PausingMySQL(pymysql.connections.Connection):  # type: ignore[misc]  # pymysql has no types
    def cursor(self, *arguments: Any, **options: Any) -> Any:
        pausing()
        return super().cursor(*arguments, **options)


class PausingPostgres(psycopg.Connection[Any]):
    def cursor(self, *arguments: Any, **options: Any) -> Any:
        pausing()
        return super().cursor(*arguments, **options)


class Database(Protocol):
    """A database with the tables of the marker and of the business, which has the column `id`.

    ignore: the words of an insert that swallows duplicates, before and after.
    """

    name: str
    ignore: tuple[str, str]

    def connect(self, *, waits: bool = True) -> Any:
        """Return a new connection of the user: autocommit off; `waits` for locks, or fails at once."""

    def own(self) -> Any:
        """Return a new connection for the marker's own use."""

    def kill(self, connection: Any) -> None:
        """End a connection as a crash of its program does, or the administrator."""

    def close(self) -> None:
        """Close what is open here."""


def execute(connection: Any, sql: str) -> list[Any]:
    cursor = connection.cursor()
    try:
        cursor.execute(sql)
        return list(cursor.fetchall()) if cursor.description else []
    finally:
        cursor.close()


def set_up(database: Database) -> None:
    """Make the tables."""
    marker = Marker(database.own)
    marker.create_table()
    marker.close()
    connection = database.connect()
    execute(connection, "CREATE TABLE business (id CHAR(32) NOT NULL)")
    connection.commit()
    connection.close()


class SqliteDatabase:
    name = "sqlite"
    ignore = ("INSERT OR IGNORE INTO", "")

    def __init__(self, path: Path, journal: str = "WAL") -> None:
        self.path = path
        connection = sqlite3.connect(path)
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.close()

    def connect(self, *, waits: bool = True) -> Any:
        connection = sqlite3.connect(
            self.path, timeout=5 if waits else 0, factory=PausingSqlite, check_same_thread=False
        )
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    def own(self) -> Any:
        # The marker sets its own timeout.
        connection = sqlite3.connect(self.path, factory=PausingSqlite)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    def kill(self, connection: Any) -> None:
        connection.close()

    def close(self) -> None:
        pass


class MariaDBDatabase:
    name = "mariadb"
    ignore = ("INSERT IGNORE INTO", "")

    def __init__(self, server: MariaDB) -> None:
        self.server = server
        self.database = f"marker_{os.urandom(6).hex()}"
        self._admin = server.connect(autocommit=True)
        execute(self._admin, f"CREATE DATABASE {self.database}")

    def connect(self, *, waits: bool = True) -> Any:
        connection = self._open()
        execute(connection, f"SET SESSION innodb_lock_wait_timeout = {5 if waits else 0}")
        return connection

    def own(self) -> Any:
        return self._open()

    def _open(self) -> Any:
        return PausingMySQL(
            host=self.server.host, port=self.server.port, user="kiteq", database=self.database, ssl_disabled=True
        )

    def kill(self, connection: Any) -> None:
        """The server ends the session; the client does not know."""
        execute(self._admin, f"KILL CONNECTION {connection.thread_id()}")

    def close(self) -> None:
        execute(self._admin, f"DROP DATABASE {self.database}")
        self._admin.close()


class PostgresDatabase:
    name = "postgres"
    ignore = ("INSERT INTO", "ON CONFLICT DO NOTHING")

    def __init__(self, server: PostgreSQL) -> None:
        self.server = server
        self.database = f"marker_{os.urandom(6).hex()}"
        self._admin = server.connect(autocommit=True)
        self._admin.execute(f"CREATE DATABASE {self.database}")

    def connect(self, *, waits: bool = True) -> Any:
        return self._open(f"-c lock_timeout={5000 if waits else 1}")

    def own(self) -> Any:
        return self._open("")

    def _open(self, options: str) -> Any:
        return PausingPostgres.connect(
            f"host={self.server.host} port={self.server.port} user=kiteq dbname={self.database}", options=options
        )

    def kill(self, connection: Any) -> None:
        """The server ends the session; the client does not know."""
        self._admin.execute(f"SELECT pg_terminate_backend({connection.info.backend_pid})")

    def close(self) -> None:
        self._admin.execute(f"DROP DATABASE {self.database} WITH (FORCE)")
        self._admin.close()
