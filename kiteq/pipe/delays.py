"""Messages that wait for their time: what is known of them in memory, how they are stored, how one is cancelled.

They are kept in one table in order of their due time. `kiteq.delaying` sleeps until the first of them is
due and moves it into the log. In memory are only the time of that first one and two figures, whatever
their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from kiteq.errors import Refused
from kiteq.ids import check_id
from kiteq.limits import DELAY_MS_MAX
from kiteq.message import HEAD_OFFSET, Extras, parse_extras, parse_head, split
from kiteq.pipe.events import Frame, Kind
from kiteq.store import delayed
from kiteq.store.records import DamagedRecord
from kiteq.store.tables import Row, Table
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.clock import Clock
    from kiteq.pipe.core import Core
    from kiteq.store.tables import Tables

__all__ = ["Delays", "Saved", "cancel", "check_due", "due_of", "frame_of", "save_delayed", "split_delayed"]

LOOK_SECONDS: Final = 0.1
"""The clock is looked at this often while messages wait, as by the other timers, should it be put forward."""
NUMBERS_PER_START: Final = 1 << 40
"""Messages that are numbered between two starts of a broker; more than it could ever store."""
SEARCH_BYTES: Final = 1 << 20
"""What a search for a message looks at in one piece."""
NO_EXTRAS: Final = b"\0\0"


class Saved(NamedTuple):
    """Delayed messages as rows for the store, the earliest due time among them, their number and bytes."""

    rows: list[Row]
    first_ms: int
    messages: int
    size: int


class Delays:
    """What is known of the delayed messages of a broker.

    lock: held while rows of earlier commits are read and changed, until that is durable.
    next_ms: when the first is due, ms since 1970; None while none is known.
    messages, size: how many wait, and the bytes of their rows; complete once those of earlier runs are counted.
    counted_to: the key up to which those are. epoch: of the store; it rises with each start.
    """

    def __init__(self, epoch: int) -> None:
        self.lock = trio.Lock()
        self.next_ms: int | None = None
        self.messages = 0
        self.size = 0
        self.counted_to = b""
        self._first_number = self._next_number = epoch * NUMBERS_PER_START
        self._nearer = trio.Event()

    def save(self, group: str, by_due: Mapping[int, list[bytes]], now_ms: int) -> Saved:
        """Return the rows of messages of a producer group; they must be submitted in this turn."""
        rows = delayed.build_rows(group, by_due, self._next_number, now_ms)
        messages = sum(map(len, by_due.values()))
        self._next_number += messages
        return Saved(rows, min(by_due), messages, sum([len(value) for _, _, value in rows if value is not None]))

    def stored(self, saved: Saved) -> None:
        """Note that what was saved is durable."""
        self.messages += saved.messages
        self.size += saved.size
        self.look_at(saved.first_ms)

    def removed(self, key: bytes, messages: int, size: int) -> None:
        """Note that messages are durably gone from the row with this key."""
        if self.is_new(key) or key <= self.counted_to:
            self.messages -= messages
            self.size -= size

    def is_new(self, key: bytes) -> bool:
        """Return whether the row with this key was written since the start."""
        return delayed.number_of(key) >= self._first_number

    def look_at(self, due_ms: int | None) -> None:
        """Let `wait_due` return at a time, if it is before the one known; None: no row is there."""
        if due_ms is not None and (self.next_ms is None or due_ms < self.next_ms):
            self.next_ms = due_ms
            self._nearer.set()

    async def look_again(self, tables: Tables) -> None:
        """Find out anew when the first is due; the lock is held."""
        self.next_ms = None  # what is stored meanwhile is noted
        self.look_at(await trio.to_thread.run_sync(delayed.first_due, tables))

    async def wait_due(self, clock: Clock) -> None:
        """Return when messages are due."""
        while True:
            self._nearer = trio.Event()
            if self.next_ms is None:
                await self._nearer.wait()
                continue
            left_ms = self.next_ms - clock.epoch_ms()
            if left_ms <= 0:
                return
            with trio.move_on_after(min(left_ms / 1000, LOOK_SECONDS)):
                await self._nearer.wait()


def due_of(extras: Extras, now_ms: int) -> int | None:
    """Return when a message becomes deliverable, ms since 1970, None for at once.

    now_ms: the moment that a delay counts from. It was rounded down, so one is added: nothing is early.
    """
    if extras.delay_ms:
        return now_ms + 1 + extras.delay_ms
    if extras.deliver_at_ms is not None and extras.deliver_at_ms > now_ms:
        return extras.deliver_at_ms
    return None


def check_due(due_ms: int, now_ms: int) -> None:
    """Raise `Refused` for a time that is too far ahead."""
    if due_ms > now_ms + 1 + DELAY_MS_MAX:
        raise Refused("bad_limit", f"the time to deliver at must be at most {DELAY_MS_MAX // 86_400_000} days ahead")


def split_delayed(blobs: Sequence[bytes], now_ms: int) -> tuple[list[bytes], dict[int, list[bytes]]]:
    """Return, of encoded messages that were checked before, those deliverable at once, and the others by due time.

    now_ms: when they would become deliverable without a delay; of a transaction the time of its commit.
    The due times are ms since 1970. The order is kept among each of them.
    """
    at_once: list[bytes] = []
    by_due: dict[int, list[bytes]] = {}
    plain = None
    for blob in blobs:
        if plain is not None and blob.startswith(plain, HEAD_OFFSET):
            at_once.append(blob)
            continue
        head, extras, _ = split(blob)
        if not extras:
            plain = blob[HEAD_OFFSET : HEAD_OFFSET + 2] + head + NO_EXTRAS
        due_ms = due_of(parse_extras(extras), now_ms)
        if due_ms is None:
            at_once.append(blob)
        else:
            by_due.setdefault(due_ms, []).append(blob)
    return at_once, by_due


def save_delayed(core: Core, group: str, by_due: Mapping[int, list[bytes]], now_ms: int) -> Saved:
    """Return what stores delayed messages of a producer group.

    by_due, now_ms: as in `split_delayed`; at least one message. Put the result into the `delayed` of the
    `Batch` that is handed to `core.place` in this turn, with no frame when no message of it is deliverable
    at once; its rows then go into the same transaction, and the timer hears of them once that is durable.
    """
    return core.delays.save(group, by_due, now_ms)


def frame_of(core: Core, blobs: Sequence[bytes]) -> Frame:
    """Return messages that were checked when they were stored as a frame for `core.place`.

    A topic that is not served any more still takes what was stored before. Raises `BadMessage`.
    """
    frame = Frame(0, len(blobs))
    kinds: dict[bytes, Kind] = {}
    last: Kind | None = None
    for blob in blobs:
        end = HEAD_OFFSET + 2 + int.from_bytes(blob[HEAD_OFFSET : HEAD_OFFSET + 2], "big")
        head = blob[HEAD_OFFSET:end]
        kind = kinds.get(head)
        if kind is None:
            kind = kinds[head] = _stored_kind(core, head)
        if kind is last:
            frame.runs[-1][1].append(blob)
        else:
            frame.runs.append((kind, [blob]))
            last = kind
    return frame


def _stored_kind(core: Core, head: bytes) -> Kind:
    prefix = head + NO_EXTRAS
    kind = core.router.kind(prefix)
    if kind is not None:
        return kind
    parsed = parse_head(head[2:])
    try:
        return core.router.new_kind(prefix, parsed)
    except Refused:
        return Kind(prefix, parsed, core.store.topic(parsed.topic))  # the router keeps those of served topics only


async def cancel(core: Core, arguments: dict[str, Any]) -> dict[str, int]:
    """Remove a message that waits, by its id, and if given its producer group; return how many there were.

    Raises `Refused`.
    """
    group = arguments.get("group")
    try:
        message_id = check_id(arguments.get("id", ""))
    except ValueError as error:
        raise Refused("bad_argument", str(error)) from error
    if group is not None and not isinstance(group, str):
        raise Refused("bad_argument", "the group must be a text")
    cancelled = 0
    after: bytes | None = b""
    while after is not None:
        # Without the lock: a row never moves, and what the timer takes meanwhile is not there any more below.
        found = await trio.to_thread.run_sync(delayed.find, core.store.tables, message_id, after, SEARCH_BYTES)
        after = found.after
        for key in found.keys:
            async with core.delays.lock:
                cancelled += await _take_out(core, key, message_id, group)
    if not cancelled:
        whose = "" if group is None else f" of group {group!r}"
        raise Refused("unknown_message", f"no message {message_id.hex()}{whose} waits for its time"[:300])
    core.counters["cancelled"] += cancelled
    return {"cancelled": cancelled}


async def _take_out(core: Core, key: bytes, message_id: bytes, group: str | None) -> int:
    value = await trio.to_thread.run_sync(core.store.tables.get, Table.DELAYED, key)
    if value is None:
        return 0
    try:
        taken = delayed.without(key, value, message_id, group)
    except DamagedRecord:
        return 0  # it is put into quarantine when it is due
    if not taken.messages:
        return 0
    submission = Submission()
    submission.rows += taken.rows
    submission.moves = True
    error = await core.store.write(submission)
    if error is not None:
        raise Refused("store_full", str(error), temporary=True)
    core.delays.removed(key, taken.messages, taken.size)
    await core.delays.look_again(core.store.tables)
    return taken.messages
