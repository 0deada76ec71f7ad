"""The marker: one row in the user's own database transaction, and the answers to the broker's checks from it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any, Final, Self, TypeVar

from kiteq.message import Received
from kiteq_client.decision import Decision
from kiteq_client.marker.dialects import MARKER, Dialect, Executor, Trouble, dialect_named
from kiteq_client.marker.errors import AlreadyRolledBack, MarkRefused
from kiteq_client.marker.for_dbapi import Own, local_of
from kiteq_client.marker.for_django import DjangoLocal, DjangoOwn
from kiteq_client.marker.for_sqlalchemy import AlchemyLocal, AlchemyOwn, AsyncEngineRunner, check_engine
from kiteq_client.marker.leaving import Marked, Transaction, watch
from kiteq_client.marker.local import Local
from kiteq_client.marker.own import Runner, Threaded
from kiteq_client.marker.protocol import Table, now_ms

__all__ = ["Marker"]

logger = logging.getLogger("kiteq_client")

T = TypeVar("T")

TABLE: Final = "kiteq_marker"
LOCK_SECONDS: Final = 1.0
LOCK_SECONDS_MAX: Final = 2.0
"""A check that waits longer holds up others, and its answer is "running" anyway."""
TOMBSTONE_AGE: Final = timedelta(days=7)
"""The longest local transaction: a tombstone must outlive every transaction that might still insert a marker."""
FORGET_SECONDS: Final = 1.0
FORGET_IDS_MAX: Final = 100
"""Decided markers are deleted in one transaction, when so many wait or the last time is so long ago."""
DECIDED_IDS_MAX: Final = 10_000
"""Decided markers that wait for a database that fails; others are left over."""

_TABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?", re.ASCII)


class Marker:
    """Binds messages to your own database transactions, and answers the broker from your database.

        marker = Marker(lambda: sqlite3.connect("shop.db"))
        marker.create_table()

        async with Client("kiteq://localhost:13800", group="shop", topics=["trade"], on_check=marker) as client:
            async with client.transaction(Message("trade", "paid", "order 17")) as tx:
                with sqlite3.connect("shop.db") as connection:
                    marker.mark(connection, tx)
                    connection.execute("UPDATE orders SET paid = 1 WHERE id = 17")

    connect: opens a connection of sqlite3, pymysql or psycopg 3 to the primary of the database in which you
        call `mark`. It is the marker's own: your program must not use it.
    table: its name, or schema.name. lock_timeout: seconds, 0 to 2, that a check waits for an open transaction.

    Raises `ValueError` for a table or timeout out of range. Methods may be called from any thread. Those that
    ask the database raise what its driver raises.
    """

    def __init__(self, connect: Callable[[], Any], *, table: str = TABLE, lock_timeout: float = LOCK_SECONDS) -> None:
        self._set_up(Threaded(Own(connect), _checked(lock_timeout)), table)

    @classmethod
    def for_engine(cls, engine: Any, *, table: str = TABLE, lock_timeout: float = LOCK_SECONDS) -> Self:
        """Return a marker for sessions and connections of a SQLAlchemy `Engine` or `AsyncEngine`.

        Its own connections are made by the engine, and do not count for the pool. Raises `TypeError` for an
        engine that has only one connection, such as SQLite in memory, or of another database.
        """
        check_engine(engine)
        if hasattr(engine, "sync_engine"):
            return cls._on(AsyncEngineRunner(engine, _checked(lock_timeout)), table)
        return cls._on(Threaded(AlchemyOwn(engine), _checked(lock_timeout)), table)

    @classmethod
    def for_django(cls, using: str = "default", *, table: str = TABLE, lock_timeout: float = LOCK_SECONDS) -> Self:
        """Return a marker for a database of Django's settings, by its alias."""
        return cls._on(Threaded(DjangoOwn(using), _checked(lock_timeout)), table)

    @classmethod
    def _on(cls, runner: Runner, table: str) -> Self:
        marker = cls.__new__(cls)
        marker._set_up(runner, table)  # noqa: SLF001 another constructor
        return marker

    def _set_up(self, runner: Runner, table: str) -> None:
        if _TABLE_NAME.fullmatch(table) is None:
            raise ValueError(f"{table!r} is no name of a table: letters, digits and _, a schema before a dot")
        self.table = table
        self._runner = runner
        self._decided: list[str] = []
        """Markers that can go."""
        self._forgot_at = -FORGET_SECONDS

    # --- in the user's transaction -------------------------------------------------------------
    def mark(self, connection: Any, tx: Transaction) -> None:
        """Write the row for this message in the database transaction that `connection` is in.

        connection: of sqlite3, pymysql or psycopg 3; a `Session` or `Connection` of SQLAlchemy; a connection of
            Django. It begins a transaction if it does so by itself. tx: what `client.transaction` gave, of
            either client.

        Commit or roll back before the block of the message is left. Leaving then commits the message if the
        row is committed, and rolls it back if it is not.

        Raises `AlreadyRolledBack` if the message was rolled back meanwhile. After this, and after every error of
        the insert, which passes unchanged, your transaction is rolled back: do not go on with it.
        Raises `MarkRefused` in autocommit and in savepoints: those of SQLAlchemy, Django and PostgreSQL are seen,
        those that you open by SQL in SQLite and MySQL are not. Raises `TypeError` for another connection.
        """
        marked = Marked(tx, _local(connection))
        watch(marked, self._runner, self.table)
        self._insert(marked)

    async def amark(self, session: Any, tx: Transaction) -> None:
        """Do as `mark`, with an `AsyncSession` or `AsyncConnection` of SQLAlchemy."""
        if not hasattr(session, "run_sync"):
            raise TypeError(f"amark takes an async session or connection of SQLAlchemy; use mark for {session!r}")
        await session.run_sync(self.mark, tx)

    def _insert(self, marked: Marked) -> None:
        local = marked.local
        try:
            local.refuse()
            try:
                in_savepoint = Table(local.dialect, self.table).mark(local.executor, marked.tx.id.hex())
                if in_savepoint:
                    raise MarkRefused("the transaction is inside a savepoint: call mark before it")
            except BaseException as error:
                # Without its marker this transaction must not commit.
                _roll_back(local, error)
                raise
        except Exception as error:
            marked.error = error
            if local.dialect.trouble(error) is not Trouble.DUPLICATE:
                raise
            marked.error = AlreadyRolledBack(
                f"message {marked.tx.id.hex()} has its row already, because the broker asked and it was rolled back, "
                "or because it was marked and committed before: your database transaction is rolled back"
            )
            raise marked.error from error

    # --- the broker's questions ----------------------------------------------------------------
    async def check(self, message: Received) -> Decision:
        """Answer the broker: COMMIT and ROLLBACK are certain; otherwise RUNNING or UNKNOWN, and it asks again."""
        look = _Check(self.table, message.id.hex())
        try:
            return await self._runner.arun(look)
        except Exception as error:  # noqa: BLE001 whatever the driver raises, the answer is not known
            return look.failed(error)

    def check_id(self, transaction_id: bytes) -> Decision:
        """Answer the same question here, by the 16 bytes of a transaction id."""
        look = _Check(self.table, transaction_id.hex())
        try:
            return self._runner.run(look)
        except Exception as error:  # noqa: BLE001 whatever the driver raises, the answer is not known
            return look.failed(error)

    async def decided(self, transaction_id: bytes, decision: Decision) -> None:
        """Delete the marker, some time soon: the broker has the decision on disk and asks no more."""
        if decision is Decision.COMMIT:
            self._decided.append(transaction_id.hex())
            if len(self._decided) >= FORGET_IDS_MAX or monotonic() - self._forgot_at >= FORGET_SECONDS:
                self._forgot_at = monotonic()
                await self._forget()

    async def _forget(self) -> None:
        ids = self._take_decided()
        try:
            await self._runner.arun(partial(_forget, table=self.table, ids=ids))
        except Exception:
            self._decided += ids[: DECIDED_IDS_MAX - len(self._decided)]
            raise

    def _take_decided(self) -> list[str]:
        ids, self._decided = self._decided, []
        return ids

    # --- the care of the table -----------------------------------------------------------------
    def create_table(self) -> None:
        """Create the table if it does not exist. Use `create_sql` in your migrations instead, if you have some."""
        self._runner.run(self._create)

    async def acreate_table(self) -> None:
        """Do as `create_table`."""
        await self._runner.arun(self._create)

    def create_sql(self, database: str) -> str:
        """Return the statement that creates the table; database: "sqlite", "mysql", "mariadb" or "postgresql"."""
        dialect = dialect_named(database, LOCK_SECONDS)
        return Table(dialect, self.table).sql(dialect.create)

    def _create(self, executor: Executor, dialect: Dialect) -> None:
        executor.execute(Table(dialect, self.table).sql(dialect.create))

    def purge(self, older_than: timedelta = TOMBSTONE_AGE) -> int:
        """Delete tombstones older than this, and return how many.

        older_than: longer than any of your database transactions can last; one that goes on for longer could
            write its marker although the message was rolled back. Call it once a day or so, from anywhere.
        """
        purge = _Purge(self.table, older_than)
        while not purge.is_done:
            self._runner.run(purge)
        return purge.count

    async def apurge(self, older_than: timedelta = TOMBSTONE_AGE) -> int:
        """Do as `purge`."""
        purge = _Purge(self.table, older_than)
        while not purge.is_done:
            await self._runner.arun(purge)
        return purge.count

    def left_over(self, older_than: timedelta = TOMBSTONE_AGE) -> list[bytes]:
        """Return the ids of up to 500 markers older than this.

        Markers go when the broker has the decision. One is left when the program ended in that moment, or when
        the broker could not be reached since: `client.commit(id)` for each is right in both cases, and lets
        it go; `forget` is for those of which the broker answers that it does not know them.
        """
        return self._runner.run(partial(_left_over, table=self.table, older_than=older_than))

    async def aleft_over(self, older_than: timedelta = TOMBSTONE_AGE) -> list[bytes]:
        """Do as `left_over`."""
        return await self._runner.arun(partial(_left_over, table=self.table, older_than=older_than))

    def forget(self, *transaction_ids: bytes) -> None:
        """Delete the markers of messages of which you know that the broker has decided them."""
        self._runner.run(partial(_forget, table=self.table, ids=[key.hex() for key in transaction_ids]))

    async def aforget(self, *transaction_ids: bytes) -> None:
        """Do as `forget`."""
        await self._runner.arun(partial(_forget, table=self.table, ids=[key.hex() for key in transaction_ids]))

    def close(self) -> None:
        """Delete the markers that wait for it, and close the idle connections; the marker can be used again."""
        if ids := self._take_decided():
            self._runner.run(partial(_forget, table=self.table, ids=ids))
        self._runner.close()

    async def aclose(self) -> None:
        """Do as `close`."""
        if self._decided:
            await self._forget()
        await self._runner.aclose()


def _checked(lock_timeout: float) -> float:
    if not 0 <= lock_timeout <= LOCK_SECONDS_MAX:
        raise ValueError(f"lock_timeout must be 0 to {LOCK_SECONDS_MAX:g} seconds, not {lock_timeout}")
    return lock_timeout


def _roll_back(local: Local, error: BaseException) -> None:
    try:
        local.rollback()
    except Exception as failure:  # noqa: BLE001 the first error says more; the server rolls back what is lost
        error.add_note(f"the rollback failed too: {type(failure).__name__}: {failure}")


def _local(connection: Any) -> Local:
    """Return the transaction of what a user passed."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(connection).__mro__}
    if "django" in libraries:
        return DjangoLocal(connection)
    if "sqlalchemy" not in libraries:
        return local_of(connection)
    if hasattr(connection, "run_sync"):
        raise TypeError("this is an async session or connection: await marker.amark(session, tx)")
    return AlchemyLocal(connection)


class _Check:
    """The piece of work that answers one question of the broker."""

    def __init__(self, table: str, id: str) -> None:
        self._table = table
        self._id = id
        self._trouble = Trouble.OTHER

    def __call__(self, executor: Executor, dialect: Dialect) -> Decision:
        try:
            return Table(dialect, self._table).decide(executor, self._id)
        except Exception as error:
            self._trouble = dialect.trouble(error)
            raise

    def failed(self, error: Exception) -> Decision:
        """Return the answer after an error: a lock means that a transaction goes on, most likely this one."""
        if self._trouble is Trouble.LOCKED:
            return Decision.RUNNING
        logger.warning("the marker could not find out about message %s, so it stays unknown", self._id, exc_info=error)
        return Decision.UNKNOWN


class _Purge:
    """Deletes old tombstones in steps, each on a connection that is free."""

    def __init__(self, table: str, older_than: timedelta) -> None:
        self.count = 0
        self.is_done = False
        self._table = table
        self._before_ms = _milliseconds_ago(older_than)
        self._after = ""

    def __call__(self, executor: Executor, dialect: Dialect) -> None:
        count, self._after = Table(dialect, self._table).purge(executor, self._before_ms, self._after)
        self.count += count
        self.is_done = not self._after


def _milliseconds_ago(age: timedelta) -> int:
    return now_ms() - age // timedelta(milliseconds=1)


def _forget(executor: Executor, dialect: Dialect, table: str, ids: list[str]) -> None:
    Table(dialect, table).forget(executor, ids)


def _left_over(executor: Executor, dialect: Dialect, table: str, older_than: timedelta) -> list[bytes]:
    ids = Table(dialect, table).ids(executor, MARKER, _milliseconds_ago(older_than), "")
    return [bytes.fromhex(key) for key in ids]
