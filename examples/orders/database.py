"""The database of one service: SQLite in a file, or MariaDB."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kiteq_client.marker import Marker

Row = tuple[Any, ...]

ACCOUNTS = "CREATE TABLE IF NOT EXISTS accounts (name VARCHAR(32) PRIMARY KEY, balance INTEGER NOT NULL)"


class Transaction:
    """A database transaction that is under way. `connection` is what the marker wants."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._is_sqlite = isinstance(connection, sqlite3.Connection)

    def run(self, sql: str, *values: object) -> list[Row]:
        """Run one statement, with %s for values, and return its rows."""
        cursor = self.connection.cursor()
        cursor.execute(sql.replace("%s", "?") if self._is_sqlite else sql, values)
        return list(cursor.fetchall()) if cursor.description else []


class Database:
    """name: "orders" or "payments". folder: of the file of SQLite. mariadb: the server's URL, to use that instead."""

    def __init__(self, name: str, folder: Path, mariadb: str | None) -> None:
        self._name = name
        self._folder = folder
        self._mariadb = urlsplit(mariadb) if mariadb else None

    def connect(self, *, of_server: bool = False) -> Any:
        if self._mariadb is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            return sqlite3.connect(self._folder / f"{self._name}.db", timeout=10)
        import pymysql  # pip install pymysql

        return pymysql.connect(
            host=self._mariadb.hostname,
            port=self._mariadb.port or 3306,
            user=unquote(self._mariadb.username or "root"),
            password=unquote(self._mariadb.password or ""),
            database=None if of_server else f"kiteq_demo_{self._name}",
        )

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Commit at the end of the block; an exception rolls back."""
        connection = self.connect()
        try:
            yield Transaction(connection)
            connection.commit()
        finally:
            connection.close()  # rolls back what is not committed

    def create(self, table: str, accounts: dict[str, int]) -> None:
        """Create what is not there yet: a table, and accounts with their first balances."""
        if self._mariadb is not None:
            server = self.connect(of_server=True)
            server.cursor().execute(f"CREATE DATABASE IF NOT EXISTS kiteq_demo_{self._name}")
            server.close()
        with self.transaction() as database:
            database.run(ACCOUNTS)
            database.run(table)
            for name, balance in accounts.items():
                if not database.run("SELECT 1 FROM accounts WHERE name = %s", name):
                    database.run("INSERT INTO accounts (name, balance) VALUES (%s, %s)", name, balance)

    def marker(self) -> Marker:
        """Return the marker for this database, with its table."""
        marker = Marker(self.connect)
        marker.create_table()
        return marker
