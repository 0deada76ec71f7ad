"""Which records of a topic are still owed to somebody: flat numbers in memory, never an object per record.

With single-message batches a record is one message, and millions may wait; so a record is four
numbers in arrays, in segments of a thousand that go when nobody is owed anything in them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

__all__ = ["RecordEntry", "RecordIndex", "RecordSegment"]

SEGMENT_RECORDS: Final = 1_024


class RecordEntry(NamedTuple):
    """One record: its first sequence, the deliveries owed of how many once, its expiry in seconds."""

    first: int
    owed: int
    total: int
    expires_s: int


class RecordSegment(NamedTuple):
    """Of up to a thousand records: in which something has expired, and which are mostly settled, by first."""

    expired: list[int]
    mostly_settled: list[int]


class _Segment:
    """Up to a thousand records in order."""

    __slots__ = ("expires_s", "firsts", "live", "owed", "total")

    def __init__(self) -> None:
        self.firsts = array("Q")
        self.owed = array("I")
        self.total = array("I")
        self.expires_s = array("I")
        self.live = 0

    def drop_settled(self) -> None:
        keep = [index for index, owed in enumerate(self.owed) if owed]
        self.firsts = array("Q", [self.firsts[index] for index in keep])
        self.total = array("I", [self.total[index] for index in keep])
        self.expires_s = array("I", [self.expires_s[index] for index in keep])
        self.owed = array("I", [self.owed[index] for index in keep])


class RecordIndex:
    """The records of one topic in which deliveries are owed."""

    __slots__ = ("_segments", "_starts")

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._starts: list[int] = []

    def __len__(self) -> int:
        return sum(segment.live for segment in self._segments)

    def append(self, first: int, owed: int, total: int, expires_ms: int) -> None:
        """Add a record behind all others; `owed` of `total` deliveries (message times group) are left."""
        if not owed:
            return
        if not self._segments or len(self._segments[-1].firsts) >= SEGMENT_RECORDS:
            self._segments.append(_Segment())
            self._starts.append(first)
        segment = self._segments[-1]
        segment.firsts.append(first)
        segment.owed.append(owed)
        segment.total.append(total)
        segment.expires_s.append(min(expires_ms // 1000, 0xFFFFFFFF))
        segment.live += 1

    def settle(self, sequences: Sequence[int]) -> list[int]:
        """Count one delivery less for each of `sequences` (ascending); return the records now done, by first."""
        done: list[int] = []
        position, end = 0, len(sequences)
        while position < end:
            number = bisect_right(self._starts, sequences[position]) - 1
            segment = self._segments[number]
            record = bisect_right(segment.firsts, sequences[position]) - 1
            next_first = self._next_first(number, record)
            upto = end if next_first is None else _position(sequences, next_first, position, end)
            owed = segment.owed[record] - (upto - position)
            assert owed >= 0, "a delivery was settled twice"
            segment.owed[record] = owed
            if not owed:
                done.append(segment.firsts[record])
                self._forget_one(number, segment)
            position = upto
        return done

    def _next_first(self, number: int, record: int) -> int | None:
        segment = self._segments[number]
        if record + 1 < len(segment.firsts):
            return segment.firsts[record + 1]
        if number + 1 < len(self._segments):
            return self._segments[number + 1].firsts[0]
        return None

    def _forget_one(self, number: int, segment: _Segment) -> None:
        segment.live -= 1
        last = number == len(self._segments) - 1
        if not segment.live and (not last or len(segment.firsts) >= SEGMENT_RECORDS):
            del self._segments[number]
            del self._starts[number]
        elif not last and segment.live * 4 < len(segment.firsts):
            segment.drop_settled()

    def at_or_before(self, sequence: int) -> int:
        """Return where to begin reading for `sequence`: the start of the last record not after it."""
        number = bisect_right(self._starts, sequence) - 1
        if number < 0:
            return sequence
        firsts = self._segments[number].firsts
        record = bisect_right(firsts, sequence) - 1
        return firsts[record] if record >= 0 else sequence

    def entry(self, first: int) -> RecordEntry | None:
        """Return the record that starts at `first`, if deliveries of it are owed."""
        number = bisect_right(self._starts, first) - 1
        if number < 0:
            return None
        segment = self._segments[number]
        record = bisect_left(segment.firsts, first)
        if record == len(segment.firsts) or segment.firsts[record] != first or not segment.owed[record]:
            return None
        return RecordEntry(first, segment.owed[record], segment.total[record], segment.expires_s[record])

    def replace(self, first: int, owed: int) -> None:
        """Note that the record at `first` was rewritten with only the `owed` deliveries that are left."""
        number = bisect_right(self._starts, first) - 1
        segment = self._segments[number]
        record = bisect_left(segment.firsts, first)
        segment.owed[record] = segment.total[record] = owed

    def set_expiry(self, first: int, expires_ms: int) -> None:
        """Note when the next message of the record at `first` expires, if deliveries of it are owed."""
        if self.entry(first) is not None:
            segment = self._segments[bisect_right(self._starts, first) - 1]
            segment.expires_s[bisect_left(segment.firsts, first)] = min(expires_ms // 1000, 0xFFFFFFFF)

    def segments(self, now_s: int) -> Iterator[RecordSegment]:
        """Return what the timers look for, a thousand records at a time; records may change in between."""
        for start in list(self._starts):
            number = bisect_right(self._starts, start) - 1
            if number < 0:
                continue
            segment = self._segments[number]
            mostly = [
                first
                for first, owed, total in zip(segment.firsts, segment.owed, segment.total, strict=True)
                if 0 < owed * 2 < total
            ]
            expired = [
                first
                for first, owed, expires_s in zip(segment.firsts, segment.owed, segment.expires_s, strict=True)
                if owed and expires_s < now_s
            ]
            yield RecordSegment(expired, mostly)

    def entries(self) -> Iterator[RecordEntry]:
        """Return the records in order."""
        for segment in self._segments:
            for first, owed, total, expires_s in zip(
                segment.firsts, segment.owed, segment.total, segment.expires_s, strict=True
            ):
                if owed:
                    yield RecordEntry(first, owed, total, expires_s)


def _position(sequences: Sequence[int], value: int, low: int, high: int) -> int:
    """Return the first position in [low, high] of a sequence number not below `value`."""
    if type(sequences) is range:
        return min(high, max(low, value - sequences.start))
    return bisect_left(sequences, value, low, high)
