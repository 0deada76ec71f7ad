"""What the marker's own connection does: the checks, and the care of the table.

Theory of operation. A message is bound to one row, whose key is its transaction id. Whoever inserts the row
first has decided: the user's transaction with a marker, which counts once that transaction commits; or a
check with a tombstone, after which no marker can follow. So "no such row" is never an answer by itself: a
check always tries to insert first. A lock that it cannot get, or any error, means that nothing is known.
"""

from __future__ import annotations

from time import time
from typing import Final

from kiteq_client.decision import Decision
from kiteq_client.marker.dialects import MARKER, TOMBSTONE, Dialect, Executor, Trouble

__all__ = ["IDS_MAX", "Table"]

IDS_MAX: Final = 500
"""Rows that one transaction deletes, so that it stays short."""


def now_ms() -> int:
    """Return the time, in milliseconds since 1970."""
    return round(time() * 1000)


class Table:
    """The table in one kind of database; each method is one step on a connection that is given."""

    def __init__(self, dialect: Dialect, name: str) -> None:
        self.dialect = dialect
        self.name = name

    def sql(self, statement: str) -> str:
        """Fill the table's name in."""
        return statement.format(table=self.name)

    def begin(self, executor: Executor) -> None:
        """Begin a transaction on the marker's own connection."""
        for statement in self.dialect.begin:
            executor.execute(statement)

    def mark(self, executor: Executor, id: str) -> bool:
        """Insert a marker in the user's transaction; return whether it is known to stand in a savepoint."""
        rows = executor.execute(self.sql(self.dialect.mark), id, MARKER, now_ms())
        return bool(rows and rows[0][0])

    def is_marked(self, executor: Executor, id: str) -> bool:
        """Return whether a committed marker is there; False says nothing."""
        return self._kind(executor.execute(self.sql(self.dialect.read), id)) == MARKER

    def decide(self, executor: Executor, id: str) -> Decision:
        """Answer a check: RUNNING if the row is locked. Raises what the driver raises otherwise."""
        self.begin(executor)
        try:
            executor.execute(self.sql(self.dialect.insert), id, TOMBSTONE, now_ms())
        except Exception as error:
            trouble = self.dialect.trouble(error)
            if trouble is Trouble.OTHER:
                raise
            executor.execute("ROLLBACK")
            if trouble is Trouble.LOCKED:
                return Decision.RUNNING
        else:
            executor.execute("COMMIT")
            return Decision.ROLLBACK
        # A new transaction: the failed one may look at an older state of the table.
        self.begin(executor)
        kind = self._kind(executor.execute(self.sql(self.dialect.lock), id))
        executor.execute("ROLLBACK")
        if kind == MARKER:
            return Decision.COMMIT
        # No row: it was deleted in this moment, hence decided before. The next check finds out.
        return Decision.ROLLBACK if kind == TOMBSTONE else Decision.UNKNOWN

    def forget(self, executor: Executor, ids: list[str]) -> None:
        """Delete the markers of messages whose decision the broker has on disk."""
        self._delete(executor, MARKER, ids)

    def purge(self, executor: Executor, before_ms: int, after: str) -> tuple[int, str]:
        """Delete some tombstones written before a time, whose id is above `after`.

        Return how many, and the id to go on after, "" at the end.
        """
        ids = self.ids(executor, TOMBSTONE, before_ms, after)
        self._delete(executor, TOMBSTONE, ids)
        return len(ids), ids[-1] if len(ids) == IDS_MAX else ""

    def ids(self, executor: Executor, kind: str, before_ms: int, after: str) -> list[str]:
        """Return the first ids above `after` of rows of a kind written before a time, at most `IDS_MAX`."""
        sql = "SELECT id FROM {table} WHERE kind = %s AND written_ms < %s AND id > %s ORDER BY id LIMIT %s"
        return [str(row[0]) for row in executor.execute(self.sql(sql), kind, before_ms, after, IDS_MAX)]

    def _delete(self, executor: Executor, kind: str, ids: list[str]) -> None:
        for start in range(0, len(ids), IDS_MAX):
            self.begin(executor)
            for key in ids[start : start + IDS_MAX]:
                # By its key alone: for a list MySQL may scan the table, and wait for rows of open transactions.
                executor.execute(self.sql("DELETE FROM {table} WHERE id = %s AND kind = %s"), key, kind)
            executor.execute("COMMIT")

    @staticmethod
    def _kind(rows: list[tuple[object, ...]]) -> str | None:
        return str(rows[0][0]) if rows else None
