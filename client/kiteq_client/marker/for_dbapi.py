"""DB-API connections: sqlite3, pymysql and psycopg 3."""

from __future__ import annotations

import inspect
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any, Final

from kiteq_client.marker.dialects import Dialect, MySQL, PostgreSQL, SQLite
from kiteq_client.marker.errors import MarkRefused
from kiteq_client.marker.local import Local

__all__ = ["DbApiExecutor", "Own", "local_of"]

AUTOCOMMIT: Final = (
    "the connection is in autocommit, where a marker would be committed before your rows: begin a transaction first"
)
LEGACY_TRANSACTION_CONTROL: Final = -1
"""`sqlite3.LEGACY_TRANSACTION_CONTROL`, which Python 3.11 does not have."""
MYSQL_IN_TRANSACTION: Final = 1
"""SERVER_STATUS_IN_TRANS, the first bit of the status that the server sends with each result."""
PSYCOPG_IDLE: Final = 0
PSYCOPG_IN_ERROR: Final = 3
PSYCOPG_OPEN: Final = {1, 2, PSYCOPG_IN_ERROR}
"""`psycopg.pq.TransactionStatus`: active, in a transaction, in a failed one."""


class DbApiExecutor:
    """Statements on a DB-API connection; paramstyle: of its driver, as PEP 249 and SQLAlchemy name them."""

    def __init__(self, connection: Any, paramstyle: str) -> None:
        self._connection = connection
        self._paramstyle = paramstyle

    def execute(self, sql: str, *parameters: object) -> list[tuple[object, ...]]:
        """Run one statement and return its rows, whatever kind of rows the user's connection makes."""
        cursor = self._connection.cursor()
        try:
            cursor.execute(self._in_style(sql), parameters)
            rows = cursor.fetchall() if cursor.description else []
        finally:
            cursor.close()
        return [tuple(row.values()) if isinstance(row, Mapping) else tuple(row) for row in rows]

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _in_style(self, sql: str) -> str:
        if self._paramstyle in {"format", "pyformat"}:
            return sql
        if self._paramstyle == "qmark":
            return sql.replace("%s", "?")
        if self._paramstyle == "numeric_dollar":
            parts = sql.split("%s")
            return "".join(f"{part}${number}" for number, part in enumerate(parts[:-1], 1)) + parts[-1]
        raise TypeError(f"the marker does not know drivers with the parameter style {self._paramstyle}")


class _Sqlite:
    """A connection of sqlite3, with either kind of transaction control."""

    dialect: Dialect = SQLite(0)

    def __init__(self, connection: Any) -> None:
        self.executor = DbApiExecutor(connection, "qmark")
        self._connection = connection
        self._autocommit = getattr(connection, "autocommit", LEGACY_TRANSACTION_CONTROL)

    def refuse(self) -> None:
        """Raise `MarkRefused` in autocommit; a savepoint of SQL does not show."""
        connection = self._connection
        if self._autocommit == LEGACY_TRANSACTION_CONTROL:
            autocommit = connection.isolation_level is None
        else:
            autocommit = bool(self._autocommit)
        if autocommit and not connection.in_transaction:
            raise MarkRefused(AUTOCOMMIT)

    def rollback(self) -> None:
        """Roll back, also a transaction that was begun by SQL, which `rollback` overlooks in autocommit."""
        self._connection.rollback()
        if self._autocommit is True and self._connection.in_transaction:
            self.executor.execute("ROLLBACK")

    def is_open(self) -> bool | None:
        """Whether it goes on; with `autocommit=False` another one begins at once, so nobody can tell."""
        try:
            in_transaction = bool(self._connection.in_transaction)
        except sqlite3.ProgrammingError:
            return False  # closed, which rolls back
        return None if in_transaction and self._autocommit is False else in_transaction

    @staticmethod
    def own(connection: Any) -> None:
        """Let a connection of the marker's own do nothing by itself."""
        if getattr(connection, "autocommit", LEGACY_TRANSACTION_CONTROL) == LEGACY_TRANSACTION_CONTROL:
            connection.isolation_level = None
        else:
            connection.autocommit = True


class _PyMySQL:
    """A connection of pymysql."""

    dialect: Dialect = MySQL(0)

    def __init__(self, connection: Any) -> None:
        self.executor = DbApiExecutor(connection, "format")
        self._connection = connection

    def refuse(self) -> None:
        """Raise `MarkRefused` in autocommit; a savepoint of SQL does not show."""
        if self._connection.get_autocommit() and not self._connection.server_status & MYSQL_IN_TRANSACTION:
            raise MarkRefused(AUTOCOMMIT)

    def rollback(self) -> None:
        """Roll back."""
        self._connection.rollback()

    def is_open(self) -> bool:
        """Whether the connection is in a transaction, as the server last said."""
        return bool(self._connection.open and self._connection.server_status & MYSQL_IN_TRANSACTION)

    @staticmethod
    def own(connection: Any) -> None:
        """Let a connection of the marker's own do nothing by itself."""
        connection.autocommit(True)


class _Psycopg:
    """A connection of psycopg 3."""

    dialect: Dialect = PostgreSQL(0)

    def __init__(self, connection: Any) -> None:
        if inspect.iscoroutinefunction(type(connection).commit):
            raise TypeError("give the marker a psycopg.Connection, or an async session of SQLAlchemy")
        self.executor = DbApiExecutor(connection, "format")
        self._connection = connection

    def refuse(self) -> None:
        """Raise `MarkRefused` in autocommit; the row itself tells of savepoints."""
        if self._connection.autocommit and self._connection.info.transaction_status == PSYCOPG_IDLE:
            raise MarkRefused(AUTOCOMMIT)

    def rollback(self) -> None:
        """Roll back; inside `with connection.transaction()` only SQL may, unless the server has failed it already."""
        import psycopg

        try:
            self._connection.rollback()
        except psycopg.ProgrammingError:
            if self._connection.info.transaction_status != PSYCOPG_IN_ERROR:
                self.executor.execute("ROLLBACK")

    def is_open(self) -> bool:
        """Whether the connection is in a transaction."""
        return self._connection.info.transaction_status in PSYCOPG_OPEN

    @staticmethod
    def own(connection: Any) -> None:
        """Let a connection of the marker's own do nothing by itself."""
        connection.autocommit = True


_Driver = type[_Sqlite] | type[_PyMySQL] | type[_Psycopg]
_DRIVERS: Final[dict[str, _Driver]] = {"sqlite3": _Sqlite, "pymysql": _PyMySQL, "psycopg": _Psycopg}


def _driver_of(connection: object) -> _Driver:
    for kind in type(connection).__mro__:
        driver = _DRIVERS.get(kind.__module__.partition(".")[0])
        if driver is not None:
            return driver
    raise TypeError(
        f"the marker knows connections of sqlite3, pymysql and psycopg, of SQLAlchemy and of Django, not {connection!r}"
    )


def local_of(connection: object) -> Local:
    """Return the transaction of a DB-API connection. Raises `TypeError` for one of another driver."""
    return _driver_of(connection)(connection)


class Own:
    """Opens the marker's own connections by the user's function."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect

    def open(self, lock_timeout: float) -> tuple[DbApiExecutor, Dialect]:
        """Connect. Raises what the driver raises, and `TypeError` for a connection of another one."""
        connection = self._connect()
        driver = _driver_of(connection)
        driver.own(connection)
        dialect = type(driver.dialect)(lock_timeout)
        return DbApiExecutor(connection, "qmark" if driver is _Sqlite else "format"), dialect
