"""The one thread that writes: it makes a single synced commit of all that waits.

While one commit runs the next batch collects, so the disk sets the pace and no timer is needed, but
for two bounds. Acks wait a few milliseconds for a commit that somebody waits for. And when small
sends arrive during commits, so that each would cost a commit of its own, the next commit starts at
the earliest COMMIT_SPACING_SECONDS after the last one; a producer that sends one message and waits
for its receipt never meets that bound.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple
from zlib import crc32

from kiteq.errors import KiteQError, StoreError, StoreFailed, StoreFull
from kiteq.limits import ACK_LINGER_SECONDS, COMMIT_SPACING_SECONDS, RECORD_BYTES_MAX, STORE_REFUSE_SHARE
from kiteq.store import records
from kiteq.store.records import Run
from kiteq.store.tables import SEQUENCE_KEY, Row, Table, Tables

__all__ = ["Append", "NewRecord", "Recent", "Submission", "Writer", "parse_settled"]

SMALL_BATCH_MESSAGES: Final = 64
"""A batch of fewer messages may wait for others; a larger one gains nothing from it."""
RECENT_ROWS_DROPPED_PER_COMMIT: Final = 4
"""More than are added, so the table shrinks to what the window needs."""

GROWTH_BYTES_PER_APPEND: Final = 256

ACK_TRIES: Final = 20
ACK_TRY_SECONDS: Final = 0.1
"""So long acks are tried again when there is no room for them; then the broker ends, for it cannot keep its word."""

COMMIT_KEY: Final = struct.Struct(">Q")
_SETTLED = struct.Struct(">IQQ")


class Append(NamedTuple):
    """Messages of one topic that follow each other, from one producer's batch."""

    table: Table
    """LOG, or UNROUTED for messages no group is bound to."""
    topic: int
    first: int
    blobs: list[bytes]
    runs: Sequence[Run]
    accepted_ms: int
    expires_ms: int


class Recent(NamedTuple):
    """Accepted ids of one producer group, for the duplicate window: 16 and 4 bytes each, joined."""

    group: str
    ids: bytes
    crcs: bytes


class NewRecord(NamedTuple):
    """A record that a commit has made."""

    topic: int
    first: int
    owed: int
    expires_ms: int


def _tell_nobody(_error: StoreError | None) -> None:
    pass


class Submission:
    """What one turn of the loop hands to the writer; it is committed whole, in the order of submission.

    done(error): called on the loop when it is durable (None), or was not written; by default nobody is told.
    urgent: somebody waits for the answer. snapshot: `rows` hold all cursors, so older settlements go.
    recent_floor: commits before this one left the duplicate window. refusable: refused when the store is
    full, as what appends messages is; all else is written as long as there is any room. accepted_ms: when
    messages were accepted that are not among `appends`. moves: its rows free what its appends take, so it is
    refused only when there is no room at all; else messages that fill the store could never leave it.
    """

    __slots__ = (
        "accepted_ms", "appends", "done", "messages", "moves", "recent", "recent_floor", "refusable", "rows",
        "settled", "snapshot", "urgent",
    )  # fmt: skip

    def __init__(self, done: Callable[[StoreError | None], None] = _tell_nobody, *, urgent: bool = True) -> None:
        self.done = done
        self.urgent = urgent
        self.appends: list[Append] = []
        self.messages = 0
        self.settled: list[int] = []
        """Flat (subscription, first, last) triples."""
        self.rows: list[Row] = []
        self.recent: list[Recent] = []
        self.recent_floor = 0
        self.accepted_ms = 0
        self.snapshot = False
        self.refusable = False
        self.moves = False

    @property
    def may_be_refused(self) -> bool:
        """Whether a full store refuses it; acks and what else frees room go on."""
        return self.refusable or self.moves or bool(self.appends)

    def growth_bytes(self) -> int:
        """Return about how much the store grows by it: rows beside the messages, and pages not quite full."""
        messages = sum([len(blob) for append in self.appends for blob in append.blobs])
        rows = sum([len(value) for _, _, value in self.rows if value is not None])
        return 2 * (messages + rows) + GROWTH_BYTES_PER_APPEND * len(self.appends)


Completed = Callable[[int, list[Submission], list[NewRecord], StoreError | None], None]


class Writer:
    """The loop of the writer thread.

    completed(commit, submissions, new records, error): called in the writer thread after each commit.
    """

    def __init__(
        self,
        tables: Tables,
        completed: Completed,
        *,
        first_commit: int,
        settled_commits: list[int],
        ack_try_seconds: float = ACK_TRY_SECONDS,
    ) -> None:
        self._tables = tables
        self._completed = completed
        self._queue: SimpleQueue[Submission | None] = SimpleQueue()
        self._commit = first_commit
        self._settled_commits = settled_commits
        """Commits with a row of settlements that the next snapshot replaces."""
        self._recent_from = 0
        self._recent_floor = 0
        self._failed: StoreFailed | None = None
        self._acks_refused = 0
        self._ack_try_seconds = ack_try_seconds
        self._room_bytes = 0
        """What may be added before the engine is asked again how full it is."""

    def submit(self, submission: Submission) -> None:
        """Take a submission; called on the loop. What is in it must not be changed afterwards."""
        self._queue.put(submission)

    def stop(self) -> None:
        """Let `run` return after all that was submitted before."""
        self._queue.put(None)

    def recent_rows_from(self, commit: int) -> None:
        """Tell where the table of recent ids begins; before `run`."""
        self._recent_from = commit

    def run(self) -> None:
        """Commit batches until stopped; the body of the thread."""
        last_start = 0.0
        crowded = False
        stopping = False
        while not stopping:
            batch: list[Submission] = []
            item = self._queue.get()
            stopping = item is None
            if item is not None:
                batch.append(item)
                stopping = self._drain(batch)
            if not stopping and not any(one.urgent for one in batch):
                stopping = self._linger(batch, time.monotonic() + ACK_LINGER_SECONDS, until_urgent=True)
            if not stopping and crowded and sum(one.messages for one in batch) < SMALL_BATCH_MESSAGES:
                stopping = self._linger(batch, last_start + COMMIT_SPACING_SECONDS, until_urgent=False)
            if batch:
                last_start = time.monotonic()
                self._write(batch)
                crowded = any(one.urgent for one in batch) and not self._queue.empty()

    def _drain(self, batch: list[Submission]) -> bool:
        """Move all that waits into `batch`; return whether to stop after it."""
        try:
            while (item := self._queue.get_nowait()) is not None:
                batch.append(item)
        except Empty:
            return False
        return True

    def _linger(self, batch: list[Submission], deadline: float, *, until_urgent: bool) -> bool:
        """Collect until the deadline, or until somebody waits; return whether to stop."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                item = self._queue.get(timeout=left)
            except Empty:
                return False
            if item is None:
                return True
            batch.append(item)
            if until_urgent and item.urgent:
                return self._drain(batch)
        return self._drain(batch)

    def _write(self, batch: list[Submission]) -> None:
        error: StoreError | None = self._failed
        new_records: list[NewRecord] = []
        commit = self._commit
        if error is None:
            try:
                self._check_room(batch)
                new_records = self._commit_batch(batch)
            except StoreFull as full:
                self._write_without_messages(batch, full)
                return
            except StoreFailed as failed:
                error = self._failed = failed
            except Exception as unexpected:  # noqa: BLE001 fail-stop: nothing may be promised after it
                error = self._failed = StoreFailed(f"the store's writer failed: {unexpected!r}")
                error.__cause__ = unexpected
        self._completed(commit, batch, new_records, error)

    def _check_room(self, batch: list[Submission]) -> None:
        """Raise `StoreFull` when what may be refused would fill the store above the share kept for acks."""
        growth = sum([one.growth_bytes() for one in batch if one.may_be_refused and not one.moves])
        if growth <= max(self._room_bytes, 0):  # less than none is left when acks use the share kept for them
            self._room_bytes -= growth
            return
        usage = self._tables.usage()
        self._room_bytes = int(usage.limit * STORE_REFUSE_SHARE) - usage.used
        if growth > self._room_bytes:
            raise StoreFull(f"the store uses {usage.used} of {usage.limit} bytes; consume, or raise --store-limit")
        self._room_bytes -= growth

    def _write_without_messages(self, batch: list[Submission], full: StoreFull) -> None:
        """Refuse what adds messages and commit the rest: acks free room."""
        refused = [one for one in batch if one.may_be_refused and not one.moves]
        refused = refused or [one for one in batch if one.moves]
        kept_out = set(refused)
        kept = [one for one in batch if one not in kept_out]
        names = Submission(urgent=False)
        names.rows = [row for one in refused for row in one.rows if row[0] is Table.META]
        if refused:
            self._completed(self._commit, refused, [], full)
            if names.rows:
                kept.append(names)  # of topics: later messages rely on them being stored
            if kept:
                self._write(kept)
            return
        if len(kept) > 1:
            for one in kept:
                self._write([one])  # one that frees room may be behind one that needs some
            return
        self._acks_refused += 1
        if self._acks_refused > ACK_TRIES:
            self._failed = StoreFailed(f"no room is left even for acks: {full}")
            self._completed(self._commit, kept, [], self._failed)
            return
        time.sleep(self._ack_try_seconds)  # the engine has given up its reserve, or somebody may free some room
        self._write(kept)

    def _commit_batch(self, batch: list[Submission]) -> list[NewRecord]:
        commit_key = COMMIT_KEY.pack(self._commit)
        rows: list[Row] = []
        settled: list[int] = []
        recent: list[Recent] = []
        appends: list[Append] = []
        snapshot = False
        for one in batch:
            appends += one.appends
            settled += one.settled
            recent += one.recent
            snapshot |= one.snapshot
            self._recent_floor = max(self._recent_floor, one.recent_floor)
        new_records = _build_records(appends, rows)
        if settled:
            rows.append((Table.SETTLED, commit_key, _pack_settled(commit_key, settled)))
        if recent:
            at_ms = max([append.accepted_ms for append in appends] + [one.accepted_ms for one in batch])
            rows.append((Table.RECENT, commit_key, pack_recent(commit_key, recent, at_ms)))
        for one in batch:
            rows += one.rows
        if snapshot:
            rows += [(Table.SETTLED, COMMIT_KEY.pack(old), None) for old in self._settled_commits]
        recent_upto = min(self._recent_floor, self._recent_from + RECENT_ROWS_DROPPED_PER_COMMIT)
        rows += [(Table.RECENT, COMMIT_KEY.pack(old), None) for old in range(self._recent_from, recent_upto)]
        self._tables.apply(rows)
        self._acks_refused = 0
        if snapshot:
            self._settled_commits = []
        if settled:
            self._settled_commits.append(self._commit)
        self._recent_from = max(self._recent_from, recent_upto)
        self._commit += 1
        return new_records


def _build_records(appends: list[Append], rows: list[Row]) -> list[NewRecord]:
    """Join the appends of each topic into records of about RECORD_BYTES_MAX and add their rows."""
    new_records: list[NewRecord] = []
    gathered: dict[tuple[Table, int], list[Append]] = {}
    sizes: dict[tuple[Table, int], int] = {}
    for whole in appends:
        for append in _split(whole):
            place = append[:2]
            parts = gathered.setdefault(place, [])
            size = sum(map(len, append.blobs))
            if parts and (
                sizes[place] + size > RECORD_BYTES_MAX or parts[-1].first + len(parts[-1].blobs) != append.first
            ):
                new_records.append(_build_record(parts, rows))
                parts.clear()
            sizes[place] = size + (sizes[place] if parts else 0)
            parts.append(append)
    new_records.extend(_build_record(parts, rows) for parts in gathered.values() if parts)
    return [record for record in new_records if record.owed]


def _split(append: Append) -> list[Append]:
    """Cut an append of more than a record's size; messages themselves are never cut."""
    blobs = append.blobs
    if sum(map(len, blobs)) <= RECORD_BYTES_MAX or len(blobs) == 1:
        return [append]
    half = len(blobs) // 2
    left, right = _split_runs(append.runs, half)
    return [
        *_split(append._replace(blobs=blobs[:half], runs=left)),
        *_split(append._replace(first=append.first + half, blobs=blobs[half:], runs=right)),
    ]


def _split_runs(runs: Sequence[Run], at: int) -> tuple[list[Run], list[Run]]:
    left: list[Run] = []
    right: list[Run] = []
    for messages, owners in runs:
        taken = min(messages, max(at, 0))
        at -= messages
        if taken:
            left.append((taken, owners))
        if taken < messages:
            right.append((messages - taken, owners))
    return left, right


def _build_record(parts: list[Append], rows: list[Row]) -> NewRecord:
    first = parts[0]
    blobs = first.blobs if len(parts) == 1 else [blob for part in parts for blob in part.blobs]
    runs = records.join_runs([run for part in parts for run in part.runs])
    key = SEQUENCE_KEY.pack(first.topic, first.first)
    expires_ms = min([part.expires_ms for part in parts])
    accepted_ms = parts[-1].accepted_ms  # the latest: nothing may expire before its time
    rows.append((first.table, key, records.build(key, blobs, runs, accepted_ms, expires_ms)))
    owed = sum(messages * len(owners) for messages, owners in runs)
    return NewRecord(first.topic, first.first, owed, expires_ms)


def _pack_settled(commit_key: bytes, settled: list[int]) -> bytes:
    packed = struct.pack(">" + "IQQ" * (len(settled) // 3), *settled)
    return crc32(packed, crc32(commit_key)).to_bytes(4, "big") + packed


def parse_settled(key: bytes, value: bytes) -> list[tuple[int, int, int]]:
    """Return the (subscription, first, last) of a row of the settled table. Raises `KiteQError`."""
    if crc32(value[4:], crc32(key)) != int.from_bytes(value[:4], "big"):
        raise KiteQError("the checksum of a row of settlements does not match")
    return list(_SETTLED.iter_unpack(value[4:]))


def pack_recent(key: bytes, recent: list[Recent], at_ms: int) -> bytes:
    """Return the value of a row of the recent table; `at_ms`: when its messages were accepted."""
    parts: list[bytes] = []
    for group, ids, crcs in recent:
        name = group.encode()
        parts += [len(name).to_bytes(2, "big"), name, (len(ids) // 16).to_bytes(4, "big"), ids, crcs]
    packed = COMMIT_KEY.pack(at_ms) + b"".join(parts)
    return crc32(packed, crc32(key)).to_bytes(4, "big") + packed


def parse_recent(key: bytes, value: bytes) -> tuple[int, list[Recent]]:
    """Return when a row of the recent table was written (ms since 1970), and its ids. Raises `KiteQError`."""
    if crc32(value[4:], crc32(key)) != int.from_bytes(value[:4], "big"):
        raise KiteQError("the checksum of a row of recent ids does not match")
    recent: list[Recent] = []
    position = 12
    while position < len(value):
        name_end = position + 2 + int.from_bytes(value[position : position + 2], "big")
        count = int.from_bytes(value[name_end : name_end + 4], "big")
        ids_end = name_end + 4 + 16 * count
        crcs_end = ids_end + 4 * count
        recent.append(
            Recent(value[position + 2 : name_end].decode(), value[name_end + 4 : ids_end], value[ids_end:crcs_end])
        )
        position = crcs_end
    return int.from_bytes(value[4:12], "big"), recent
