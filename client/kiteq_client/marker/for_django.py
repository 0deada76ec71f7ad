"""Django's connections, in an `atomic` block."""

from __future__ import annotations

import logging
from typing import Any

from kiteq_client.marker.dialects import Dialect, dialect_named
from kiteq_client.marker.errors import MarkRefused

__all__ = ["DjangoLocal", "DjangoOwn"]

logger = logging.getLogger("kiteq_client")


class DjangoExecutor:
    """Statements on a connection of Django."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, sql: str, *parameters: object) -> list[tuple[object, ...]]:
        """Run one statement and return its rows."""
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return list(cursor.fetchall()) if cursor.description else []

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class DjangoLocal:
    """The `atomic` block that a user's connection is in."""

    def __init__(self, connection: Any) -> None:
        from django.db import connections

        # `django.db.connection` stands for another object in each thread; the hook may run in another one.
        self._connection = connections[connection.alias]
        self.executor = DjangoExecutor(self._connection)
        self.dialect: Dialect = dialect_named(connection.vendor, 0)

    def refuse(self) -> None:
        """Raise `MarkRefused` outside of atomic, or inside one that is only a savepoint."""
        if not self._connection.in_atomic_block:
            raise MarkRefused("the marker belongs into a transaction: call mark inside `with transaction.atomic():`")
        if any(self._connection.savepoint_ids):
            raise MarkRefused(
                "an atomic block inside another is only a savepoint: call mark in the outermost one, or write "
                "atomic(savepoint=False); in tests use TransactionTestCase"
            )

    def rollback(self) -> None:
        """Roll back now, and let the atomic block refuse further queries and end in a rollback."""
        connection = self._connection
        connection.set_rollback(True)
        with connection.wrap_database_errors:
            connection.connection.rollback()

    def is_open(self) -> bool:
        """Whether the connection is in an atomic block."""
        return bool(self._connection.in_atomic_block)

    def on_commit(self, call: Any) -> None:
        """Call it after the commit of the outermost atomic block; drop it at a rollback."""
        self._connection.on_commit(call, robust=True)


class DjangoOwn:
    """Opens the marker's own connections as a database of `settings.DATABASES` says."""

    def __init__(self, using: str) -> None:
        self._using = using

    def open(self, lock_timeout: float) -> tuple[DjangoExecutor, Dialect]:
        """Connect. Raises what Django raises."""
        from django.db import connections

        connection = connections[self._using].copy()
        # It goes from thread to thread, one at a time.
        connection.inc_thread_sharing()
        dialect = dialect_named(connection.vendor, lock_timeout)
        return DjangoExecutor(connection), dialect
