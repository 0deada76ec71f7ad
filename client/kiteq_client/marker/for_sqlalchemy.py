"""Sessions and connections of SQLAlchemy, and engines for the marker's own."""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio.lowlevel import current_token

from kiteq_client.marker.dialects import Dialect, dialect_named
from kiteq_client.marker.errors import MarkRefused
from kiteq_client.marker.for_dbapi import DbApiExecutor
from kiteq_client.marker.own import CONNECTIONS_MAX, IDLE_SECONDS_TRUSTED, Work, limiter

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["AlchemyLocal", "AlchemyOwn", "AsyncEngineRunner", "check_engine"]

T = TypeVar("T")


class AlchemyExecutor:
    """Statements on a user's connection of SQLAlchemy."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, *parameters: object) -> list[tuple[object, ...]]:
        """Run one statement and return its rows."""
        from sqlalchemy import text

        parts = sql.split("%s")
        # "::" is a cast, which `text` would take for a name.
        named = "".join(f"{part}:p{index}" for index, part in enumerate(parts[:-1])) + parts[-1]
        statement = text(named.replace("::", "\\:\\:"))
        result = self._connection.execute(statement, {f"p{index}": value for index, value in enumerate(parameters)})
        return [tuple(row) for row in result] if result.returns_rows else []


class AlchemyLocal:
    """The transaction of a `Session`, a `scoped_session` or a `Connection`."""

    def __init__(self, session: Any) -> None:
        if hasattr(session, "registry"):
            session = session()
        self._session = session
        # Of a session this begins its transaction, if nothing has yet.
        self._connection: Connection = session.connection() if hasattr(session, "get_bind") else session
        self.dialect: Dialect = dialect_named(self._connection.dialect.name, 0)
        self.executor = AlchemyExecutor(self._connection)
        if not self._connection.in_transaction():
            self._connection.begin()
        self._transaction = self._connection.get_transaction()

    def refuse(self) -> None:
        """Raise `MarkRefused` in autocommit or inside a savepoint that SQLAlchemy knows of."""
        if self._session.in_nested_transaction() or self._connection.in_nested_transaction():
            raise MarkRefused("the session is inside a savepoint (begin_nested): call mark before it")
        if _is_autocommit(self._connection):
            raise MarkRefused("the connection is in autocommit, where a marker would be committed before your rows")

    def rollback(self) -> None:
        """Roll the session back, and the transaction of a connection that it was given."""
        self._session.rollback()
        if self._transaction is not None and self._transaction.is_active:
            self._transaction.rollback()

    def is_open(self) -> bool:
        """Whether the very transaction that was marked goes on."""
        return self._transaction is not None and self._transaction.is_active


def _is_autocommit(connection: Connection) -> bool:
    level = connection.get_execution_options().get("isolation_level")
    if level is not None:
        return bool(level == "AUTOCOMMIT")
    raw = connection.connection
    detect = getattr(connection.dialect, "detect_autocommit_setting", None)
    if detect is None or not detect(raw.dbapi_connection):
        return False
    # With sqlite3 a listener may have begun a transaction by SQL, as SQLAlchemy's documentation advises.
    return not getattr(raw.driver_connection, "in_transaction", False)


def check_engine(engine: Engine | AsyncEngine) -> None:
    """Raise `TypeError` for an engine of which the marker cannot have a connection of its own."""
    from sqlalchemy.pool import SingletonThreadPool, StaticPool

    dialect_named(engine.dialect.name, 0)
    if isinstance(engine.pool, SingletonThreadPool | StaticPool):
        raise TypeError("the marker needs connections of its own, and this engine shares one; use a file, not memory")


class AlchemyOwn:
    """Opens the marker's own connections by a user's engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def open(self, lock_timeout: float) -> tuple[DbApiExecutor, Dialect]:
        """Connect, beside the engine's pool. Raises what SQLAlchemy raises."""
        connection = self._engine.connect()
        return _detach(connection), dialect_named(self._engine.dialect.name, lock_timeout)


def _detach(connection: Connection) -> DbApiExecutor:
    """Take a connection out of its pool: what is set on it stays ours, and nobody waits for it."""
    connection.detach()
    connection.dialect.set_isolation_level(connection.connection.dbapi_connection, "AUTOCOMMIT")  # type: ignore[arg-type]  # it is connected
    # The driver's connection, because listeners of the engine may begin transactions of their own.
    return _Detached(connection)


class _Detached(DbApiExecutor):
    def __init__(self, connection: Connection) -> None:
        super().__init__(connection.connection.dbapi_connection, connection.dialect.paramstyle)
        self._alchemy = connection

    def close(self) -> None:
        self._alchemy.close()


class AsyncEngineRunner:
    """Work on connections of an async engine."""

    def __init__(self, engine: AsyncEngine, lock_timeout: float) -> None:
        self._engine = engine
        self._dialect = dialect_named(engine.dialect.name, lock_timeout)
        self._idle: list[tuple[AsyncConnection, float]] = []
        self._loop: object = None
        """Where the idle connections belong: another loop cannot use them."""

    def run(self, work: Work[T]) -> T:
        """Raise `TypeError`: what waits for an async engine must be awaited."""
        raise TypeError("this marker has an async engine: await amark, acreate_table, apurge, ...")

    async def arun(self, work: Work[T]) -> T:
        """Do it in the event loop. Raises what SQLAlchemy raises."""
        async with limiter():
            connection = await self._take()
            try:
                result = await connection.run_sync(self._do, work)
            except BaseException:
                await _close(connection)
                raise
            if self._dialect.one_thread_only or len(self._idle) >= CONNECTIONS_MAX:
                await _close(connection)
            else:
                self._idle.append((connection, monotonic()))
            return result

    def close(self) -> None:
        """Raise `TypeError`, as `run`."""
        raise TypeError("this marker has an async engine: await aclose()")

    async def aclose(self) -> None:
        """Close what is not in use."""
        idle, self._idle = self._idle, []
        if self._loop == current_token():
            for connection, _ in idle:
                await _close(connection)

    async def _take(self) -> AsyncConnection:
        if self._loop != current_token():
            self._idle, self._loop = [], current_token()
        while self._idle:
            connection, since = self._idle.pop()
            if monotonic() - since <= IDLE_SECONDS_TRUSTED:
                return connection
            await _close(connection)
        connection = await self._engine.connect()
        try:
            await connection.run_sync(self._set_up)
        except BaseException:
            await _close(connection)
            raise
        return connection

    def _set_up(self, connection: Connection) -> None:
        executor = _detach(connection)
        for statement in self._dialect.setup:
            executor.execute(statement)

    def _do(self, connection: Connection, work: Work[T]) -> T:
        return work(_Detached(connection), self._dialect)


async def _close(connection: AsyncConnection) -> None:
    # Also while being cancelled: an open transaction would hold its row until the server notices.
    with anyio.CancelScope(shield=True):
        with suppress(Exception):  # it failed before, and is dropped either way
            await connection.run_sync(_close_driver)
            await connection.close()


def _close_driver(connection: Connection) -> None:
    # Of some async drivers SQLAlchemy does not close what was detached.
    raw = connection.connection.dbapi_connection
    connection.invalidate()
    if raw is not None:
        raw.close()
