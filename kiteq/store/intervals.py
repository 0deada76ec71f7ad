"""A set of sequence numbers that is dense at the bottom: a floor, and a few ranges above it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

__all__ = ["IntervalSet"]


class IntervalSet:
    """Numbers from 0 on. Everything below `floor` is in it.

    ranges: `[low, high, low, high, ...]`, inclusive, ascending, not touching each other nor the floor.
    """

    __slots__ = ("_highs", "_lows", "floor")

    def __init__(self, floor: int = 0, ranges: Sequence[int] = ()) -> None:
        self.floor = floor
        self._lows: list[int] = []
        self._highs: list[int] = []
        for low, high in zip(ranges[::2], ranges[1::2], strict=True):
            self.add(low, high)

    @property
    def ranges(self) -> list[int]:
        """The ranges above the floor, flat."""
        return [bound for pair in zip(self._lows, self._highs, strict=True) for bound in pair]

    def add(self, low: int, high: int) -> None:
        """Add low..high, both included; parts may be in it already."""
        if low <= self.floor:
            if high >= self.floor:
                self.floor = high + 1
                if self._lows:
                    self._raise_floor()
            return
        start = bisect_left(self._highs, low - 1)
        stop = bisect_right(self._lows, high + 1)
        if start < stop:
            low = min(low, self._lows[start])
            high = max(high, self._highs[stop - 1])
        self._lows[start:stop] = [low]
        self._highs[start:stop] = [high]

    def _raise_floor(self) -> None:
        """Swallow the ranges that the floor has reached."""
        reached = bisect_right(self._lows, self.floor)
        if reached:
            self.floor = max(self.floor, self._highs[reached - 1] + 1)
            del self._lows[:reached]
            del self._highs[:reached]

    def __contains__(self, number: int) -> bool:
        if number < self.floor:
            return True
        place = bisect_right(self._lows, number) - 1
        return place >= 0 and number <= self._highs[place]

    def gaps(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Return the ranges of low..high, both included, that are not in it."""
        low = max(low, self.floor)
        place = bisect_left(self._highs, low)
        while low <= high:
            if place == len(self._lows) or self._lows[place] > high:
                yield low, high
                return
            if self._lows[place] > low:
                yield low, self._lows[place] - 1
            low = self._highs[place] + 1
            place += 1

    def count_missing(self, low: int, high: int) -> int:
        """Return how many numbers of low..high, both included, are not in it."""
        return sum(stop - start + 1 for start, stop in self.gaps(low, high))

    def copy(self) -> IntervalSet:
        """Return a set of its own with the same numbers."""
        return IntervalSet(self.floor, self.ranges)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IntervalSet):
            return NotImplemented
        return self.floor == other.floor and self.ranges == other.ranges

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"IntervalSet({self.floor}, {self.ranges})"
