"""Half messages kept in memory until they are decided, which most are within milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from kiteq.limits import HALF_CACHE_BYTES_MAX

__all__ = ["HalfCache"]

ROW_OVERHEAD_BYTES: Final = 256
"""What a row costs beside its messages."""


class HalfCache:
    """The messages of the latest rows, by row; the oldest go when there are too many."""

    __slots__ = ("_rows", "_size")

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Sequence[int], list[bytes]]] = {}
        self._size = 0

    def put(self, row: int, sizes: Sequence[int], blobs: list[bytes]) -> None:
        """Keep the messages of a row; `sizes`: how many each transaction has."""
        starts = () if len(sizes) == len(blobs) else tuple(accumulate(sizes, initial=0))
        self._rows[row] = (starts, blobs)
        self._size += sum(map(len, blobs)) + ROW_OVERHEAD_BYTES
        while self._size > HALF_CACHE_BYTES_MAX and len(self._rows) > 1:
            self.forget(next(iter(self._rows)))

    def get(self, row: int, place: int) -> list[bytes] | None:
        """Return the messages of the transaction at a place of a row, None when the row is not kept."""
        kept = self._rows.get(row)
        if kept is None:
            return None
        starts, blobs = kept
        return blobs[starts[place] : starts[place + 1]] if starts else blobs[place : place + 1]

    def singles(self, row: int) -> list[bytes] | None:
        """Return the messages of a row of which each is a transaction, None when it is another, or not kept."""
        kept = self._rows.get(row)
        return None if kept is None or kept[0] else kept[1]

    def get_all(self, row: int) -> list[bytes] | None:
        """Return all messages of a row, None when it is not kept."""
        kept = self._rows.get(row)
        return None if kept is None else kept[1]

    def forget(self, row: int) -> None:
        """Keep a row no longer."""
        kept = self._rows.pop(row, None)
        if kept is not None:
            self._size -= sum(map(len, kept[1])) + ROW_OVERHEAD_BYTES
