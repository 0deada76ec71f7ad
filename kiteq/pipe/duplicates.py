"""The duplicate window: which message ids were accepted lately, so that a repeated send is stored once.

Two generations of dicts: the older one is dropped whole when the younger is half full or old enough.
One large dict with removal of single ids pauses the loop for 24 ms (500,000 ids, measured).
"""

from __future__ import annotations

from kiteq.limits import DUPLICATE_IDS_MAX, DUPLICATE_WINDOW_SECONDS
from kiteq.store.writer import Recent

__all__ = ["DuplicateWindow"]

Ids = dict[bytes, bytes]


class DuplicateWindow:
    """Accepted (producer group, message id) with the body's CRC, for all of one broker."""

    def __init__(self, now: float, commit: int) -> None:
        self._young: dict[str, Ids] = {}
        self._old: dict[str, Ids] = {}
        self._young_count = 0
        self._young_since = now
        self._young_commit = commit
        self.floor_commit = 0
        """Rows of the recent table of commits before this one are not needed any more."""

    def known(self, group: str, ids: list[bytes]) -> bool:
        """Return whether any of the ids is in the window, or appears twice."""
        young, old = self._young.get(group), self._old.get(group)
        return (
            (young is not None and not young.keys().isdisjoint(ids))
            or (old is not None and not old.keys().isdisjoint(ids))
            or len(set(ids)) != len(ids)
        )

    def body_crc(self, group: str, message_id: bytes) -> bytes | None:
        """Return the CRC of the body an id was accepted with, None when it is not in the window."""
        found = self._young.get(group, {}).get(message_id)
        return found if found is not None else self._old.get(group, {}).get(message_id)

    def add(self, group: str, ids: list[bytes], crcs: list[bytes]) -> None:
        """Note accepted ids."""
        self._young.setdefault(group, {}).update(zip(ids, crcs, strict=True))
        self._young_count += len(ids)

    def forget(self, group: str, ids: list[bytes]) -> None:
        """Take back ids whose messages were not stored after all."""
        young, old = self._young.get(group, {}), self._old.get(group, {})
        for message_id in ids:
            if young.pop(message_id, None) is not None:
                self._young_count -= 1
            old.pop(message_id, None)

    @property
    def is_full(self) -> bool:
        """Whether the younger generation holds its share of ids."""
        return self._young_count >= DUPLICATE_IDS_MAX // 2

    def rotate(self, now: float, commit: int) -> None:
        """Drop the older generation when the window has moved on.

        commit: the last one known to be finished, a lower bound for where the next ids are stored.
        """
        if not self.is_full and now - self._young_since < DUPLICATE_WINDOW_SECONDS:
            return
        self._old, self._young = self._young, {}
        self._young_count = 0
        self._young_since = now
        self.floor_commit, self._young_commit = self._young_commit, commit

    def rebuild(self, rows: list[tuple[int, int, list[Recent]]], oldest_ms: int) -> None:
        """Fill the window from the recent table after a restart: the newest ids first, back to `oldest_ms`."""
        count = 0
        for commit, at_ms, groups in reversed(rows):
            if at_ms < oldest_ms or count >= DUPLICATE_IDS_MAX // 2:
                break
            for group, ids, crcs in groups:
                known = self._young.setdefault(group, {})
                for position in range(len(ids) // 16):
                    message_id = ids[16 * position : 16 * position + 16]
                    known.setdefault(message_id, crcs[4 * position : 4 * position + 4])
                count += len(ids) // 16
            self._young_commit = commit
        self._young_count = count
