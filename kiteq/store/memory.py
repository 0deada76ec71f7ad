"""Tables in memory: nothing survives the process. For tests and for traffic that may be lost."""

from __future__ import annotations

from bisect import bisect_left, insort
from threading import Lock

from kiteq.errors import StoreFull
from kiteq.store.tables import Row, Table, Usage

__all__ = ["MemoryTables"]


class MemoryTables:
    """Sorted keys and a dict per table.

    bytes_max: rows beyond this raise `StoreFull`.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._used = 0
        self._lock = Lock()
        self._values: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}
        self._keys: dict[Table, list[bytes]] = {table: [] for table in Table}

    def apply(self, rows: list[Row]) -> None:
        """Write rows in order, all or none."""
        with self._lock:
            growth = self._growth(rows)
            if growth > 0 and self._used + growth > self._bytes_max:
                raise StoreFull(f"the memory store holds {self._used} bytes, its limit is {self._bytes_max}")
            for table, key, value in rows:
                self._put(table, key, value)

    def _growth(self, rows: list[Row]) -> int:
        """Return how many bytes more are held after these rows; less than none when they free room."""
        sizes: dict[tuple[Table, bytes], int] = {}
        growth = 0
        for table, key, value in rows:
            before = sizes.get((table, key))
            if before is None:
                old = self._values[table].get(key)
                before = 0 if old is None else len(key) + len(old)
            sizes[table, key] = after = 0 if value is None else len(key) + len(value)
            growth += after - before
        return growth

    def _put(self, table: Table, key: bytes, value: bytes | None) -> None:
        values, keys = self._values[table], self._keys[table]
        old = values.get(key)
        if old is not None:
            self._used -= len(key) + len(old)
        if value is None:
            if old is not None:
                del values[key]
                del keys[bisect_left(keys, key)]
            return
        if old is None:
            if not keys or key > keys[-1]:
                keys.append(key)
            else:
                insort(keys, key)
        values[key] = value
        self._used += len(key) + len(value)

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the value of a key."""
        with self._lock:
            return self._values[table].get(key)

    def scan(
        self, table: Table, start: bytes, end: bytes, *, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Return rows with start <= key < end in order."""
        with self._lock:
            keys, values = self._keys[table], self._values[table]
            found: list[tuple[bytes, bytes]] = []
            size = 0
            for position in range(bisect_left(keys, start), bisect_left(keys, end)):
                key = keys[position]
                value = values[key]
                found.append((key, value))
                size += len(value)
                if bytes_max is not None and size >= bytes_max:
                    break
            return found

    def usage(self) -> Usage:
        """Return how full the tables are; a disk plays no part."""
        return Usage(self._used, self._bytes_max, disk_free=self._bytes_max, disk_size=self._bytes_max)

    def close(self) -> None:
        """Forget everything."""
        self._values = {table: {} for table in Table}
        self._keys = {table: [] for table in Table}
