"""What differs between the databases: the statements, and what their errors mean.

Theory of operation. Statements use `%s` for parameters; an executor translates. Errors are known by their
codes, found along the chain of wrapped errors, so that no driver has to be imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import Enum, auto
from typing import ClassVar, Final, Protocol

__all__ = ["MARKER", "TOMBSTONE", "Dialect", "Executor", "MySQL", "PostgreSQL", "SQLite", "Trouble", "dialect_named"]

MARKER: Final = "marker"
"""The kind of a row that the user's transaction wrote: the message is committed."""
TOMBSTONE: Final = "tombstone"
"""The kind of a row that a check wrote: the message is rolled back, and no marker can follow."""


class Executor(Protocol):
    """A connection of any library, reduced to what the marker needs."""

    def execute(self, sql: str, *parameters: object) -> list[tuple[object, ...]]:
        """Run one statement and return its rows, none if it has no result."""


class Trouble(Enum):
    """What an error of a statement means for the marker."""

    DUPLICATE = auto()
    """The row is there, committed."""
    LOCKED = auto()
    """Another transaction holds it, or the database, for longer than we wait."""
    OTHER = auto()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those it wraps: SQLAlchemy keeps the driver's in `orig`, Django in `__cause__`."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        original = getattr(seen, "orig", None)
        seen = original if isinstance(original, BaseException) else seen.__cause__


class Dialect:
    """One kind of database. `begin`: the statements that begin a transaction of the marker's own connection."""

    name: ClassVar[str]
    begin: tuple[str, ...]
    create: ClassVar[str]
    insert: ClassVar[str] = "INSERT INTO {table} (id, kind, written_ms) VALUES (%s, %s, %s)"
    mark: ClassVar[str] = insert
    """A row whose first column is true says that the marker stands inside a savepoint."""
    read: ClassVar[str] = "SELECT kind FROM {table} WHERE id = %s"
    lock: ClassVar[str] = read + " FOR UPDATE"
    one_thread_only: ClassVar[bool] = False
    """A connection cannot be kept for another thread; opening one costs next to nothing."""

    def __init__(self, lock_timeout: float) -> None:
        """lock_timeout: seconds the marker's own connection waits for a lock."""
        self.lock_timeout = lock_timeout

    @property
    def setup(self) -> tuple[str, ...]:
        """The statements that prepare a new connection of the marker's own."""
        return ()

    def trouble(self, error: BaseException) -> Trouble:
        """Say what an error means."""
        for cause in _chain(error):
            found = self._trouble(cause)
            if found is not Trouble.OTHER:
                return found
        return Trouble.OTHER

    def _trouble(self, error: BaseException) -> Trouble:
        raise NotImplementedError


class SQLite(Dialect):
    """One writer at a time: `BEGIN IMMEDIATE` takes the lock that every other writer needs."""

    name = "sqlite"
    begin = ("BEGIN IMMEDIATE",)
    create = """\
CREATE TABLE IF NOT EXISTS {table} (
    id CHAR(32) NOT NULL PRIMARY KEY,
    kind VARCHAR(9) NOT NULL,
    written_ms BIGINT NOT NULL
) WITHOUT ROWID"""
    lock = Dialect.read
    one_thread_only = True

    @property
    def setup(self) -> tuple[str, ...]:
        """Wait this long for other writers."""
        return (f"PRAGMA busy_timeout = {round(self.lock_timeout * 1000)}",)

    def _trouble(self, error: BaseException) -> Trouble:
        code = getattr(error, "sqlite_errorcode", None)
        if type(code) is not int:
            return Trouble.OTHER
        if code in {1555, 2067}:  # SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_UNIQUE
            return Trouble.DUPLICATE
        if code & 0xFF in {5, 6}:  # SQLITE_BUSY, SQLITE_LOCKED
            return Trouble.LOCKED
        return Trouble.OTHER


class MySQL(Dialect):
    """MySQL and MariaDB with InnoDB; read committed, so that the marker's own connection holds no gap locks."""

    name = "mysql"
    begin = ("START TRANSACTION",)
    create = """\
CREATE TABLE IF NOT EXISTS {table} (
    id CHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY,
    kind VARCHAR(9) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    written_ms BIGINT NOT NULL
) ENGINE=InnoDB"""

    @property
    def setup(self) -> tuple[str, ...]:
        """Isolation and lock timeouts, in whole seconds, of the session; `lock_wait_timeout` is for table locks."""
        seconds = math.ceil(self.lock_timeout)
        return (
            "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
            f"SET SESSION innodb_lock_wait_timeout = {seconds}",
            f"SET SESSION lock_wait_timeout = {max(1, seconds)}",
        )

    def _trouble(self, error: BaseException) -> Trouble:
        code = error.args[0] if error.args else None
        if code == 1062:
            return Trouble.DUPLICATE
        if code in {1205, 1213, 1969, 3024, 3572}:  # lock wait, deadlock, statement timeouts of both, NOWAIT
            return Trouble.LOCKED
        return Trouble.OTHER


class PostgreSQL(Dialect):
    """PostgreSQL. Settings are local to a transaction: a pooler may give the next one to another session."""

    name = "postgresql"
    create = """\
CREATE TABLE IF NOT EXISTS {table} (
    id CHAR(32) NOT NULL PRIMARY KEY,
    kind VARCHAR(9) NOT NULL,
    written_ms BIGINT NOT NULL
)"""
    # A row written inside a savepoint carries the number of the savepoint, not of the transaction.
    mark = Dialect.insert + " RETURNING xmin::text::bigint <> (txid_current() & 4294967295)"

    def __init__(self, lock_timeout: float) -> None:
        super().__init__(lock_timeout)
        # 0 would mean to wait for ever.
        milliseconds = max(1, round(lock_timeout * 1000))
        self.begin = ("BEGIN ISOLATION LEVEL READ COMMITTED", f"SET LOCAL lock_timeout = {milliseconds}")

    def _trouble(self, error: BaseException) -> Trouble:
        code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if code == "23505":
            return Trouble.DUPLICATE
        if code in {"55P03", "40P01", "40001", "57014"}:  # lock timeout, deadlock, serialization, statement timeout
            return Trouble.LOCKED
        return Trouble.OTHER


_BY_NAME: Final[dict[str, type[Dialect]]] = {
    "sqlite": SQLite,
    "mysql": MySQL,
    "mariadb": MySQL,
    "postgresql": PostgreSQL,
}


def dialect_named(name: str, lock_timeout: float) -> Dialect:
    """Return the dialect of a database as SQLAlchemy and Django call it. Raises `TypeError` for another one."""
    if name not in _BY_NAME:
        raise TypeError(f"the marker knows SQLite, MySQL, MariaDB and PostgreSQL, not {name}")
    return _BY_NAME[name](lock_timeout)
