"""Markers as one would write them at first; each loses messages or rows."""

from __future__ import annotations

from typing import Any

from kiteq_client.decision import Decision
from kiteq_client.marker import Marker
from kiteq_client.marker.dialects import Dialect, Executor
from kiteq_client.marker.for_dbapi import local_of
from kiteq_client.marker.leaving import Marked, Transaction
from kiteq_client.marker.protocol import Table
from tests.marker.databases import Database

__all__ = ["CommitsBlindly", "Defective", "IgnoresDuplicates", "KeepsTheTransaction", "LockMeansRollback", "ReadsFirst"]


class Defective(Marker):
    def __init__(self, database: Database) -> None:
        super().__init__(database.own, lock_timeout=0)
        self.database = database


class ReadsFirst(Defective):
    """Its check looks for the row, and says rollback when there is none."""

    def check_id(self, transaction_id: bytes) -> Decision:
        def look(executor: Executor, dialect: Dialect) -> Decision:
            marked = Table(dialect, self.table).is_marked(executor, transaction_id.hex())
            return Decision.COMMIT if marked else Decision.ROLLBACK

        return self._runner.run(look)


class LockMeansRollback(Defective):
    """Its check takes a lock that it cannot get for a missing marker."""

    def check_id(self, transaction_id: bytes) -> Decision:
        answer = super().check_id(transaction_id)
        return Decision.ROLLBACK if answer is Decision.RUNNING else answer


class IgnoresDuplicates(Defective):
    """Its insert does nothing when the tombstone is there."""

    def _insert(self, marked: Marked) -> None:
        before, after = self.database.ignore
        sql = f"{before} {self.table} (id, kind, written_ms) VALUES ('{marked.tx.id.hex()}', 'marker', 0) {after}"
        marked.local.executor.execute(sql)


class KeepsTheTransaction(Defective):
    """On a duplicate it raises, and leaves the user's transaction as it is."""

    def _insert(self, marked: Marked) -> None:
        marked.local.rollback = lambda: None  # type: ignore[method-assign]
        super()._insert(marked)


class CommitsBlindly(Defective):
    """It does not look at the row when the block is left."""

    def mark(self, connection: Any, tx: Transaction) -> None:
        self._insert(Marked(tx, local_of(connection)))
