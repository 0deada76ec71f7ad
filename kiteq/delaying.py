"""Moves delayed messages into the log when they are due."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import structlog
import trio

from kiteq.errors import StoreError
from kiteq.limits import READ_BYTES
from kiteq.pipe.delays import frame_of
from kiteq.pipe.events import Batch
from kiteq.pipe.settlement import head_of
from kiteq.store import delayed
from kiteq.store.records import DamagedRecord
from kiteq.store.tables import Row, Table

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.store.tables import Tables

__all__ = ["run_delayed"]

REFUSED_SECONDS: Final = 1.0
"""A store without room is tried again after this."""
COUNT_PAUSE_SECONDS: Final = 0.01
"""Between pages of the count: a million rows then take some seconds, and a third of one core."""

log = structlog.get_logger()


class _Page(NamedTuple):
    """Rows that are due, read: their keys with (messages, bytes), what is good of them, and what follows."""

    taken: list[tuple[bytes, int, int]]
    blobs: list[bytes]
    rows: list[Row]
    """Their deletions, and what goes to quarantine."""
    damaged: int
    next_ms: int | None


async def run_delayed(core: Core) -> None:
    """Move what is due until cancelled; count what waits beside it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_count, core)
        async with core.delays.lock:
            await core.delays.look_again(core.store.tables)
        while True:
            await core.delays.wait_due(core.clock)
            async with core.delays.lock:
                refused = await _move_page(core)
            if refused is not None:
                log.warning("delayed messages wait for room in the store", reason=str(refused))
                await trio.sleep(REFUSED_SECONDS)


async def _move_page(core: Core) -> StoreError | None:
    """Move some of what is due, in one transaction; return why nothing was moved."""
    delays = core.delays
    delays.next_ms = None  # what is stored while this reads is noted
    page = await trio.to_thread.run_sync(_read_page, core.store.tables, core.clock.epoch_ms())
    if not page.rows:
        delays.look_at(page.next_ms)
        return None
    if page.damaged:
        core.store.damaged_records += page.damaged
        log.error("delayed messages with a bad checksum were put into quarantine", records=page.damaged)
    outcome: list[StoreError | None] = []
    finished = trio.Event()

    def done(error: StoreError | None) -> None:
        outcome.append(error)
        finished.set()

    size = sum(map(len, page.blobs))
    core.place(Batch(None, [frame_of(core, page.blobs)], size, page.rows, done, moves=True))
    core.turn.end()
    await finished.wait()
    if outcome[0] is not None:
        delays.look_at(delayed.due_ms_of(page.taken[0][0]))
        return outcome[0]
    for key, messages, row_size in page.taken:
        delays.removed(key, messages, row_size)
    delays.look_at(page.next_ms)
    return None


def _read_page(tables: Tables, now_ms: int) -> _Page:
    """Read some of what is due; in a thread."""
    due = delayed.read_due(tables, now_ms, READ_BYTES)
    taken: list[tuple[bytes, int, int]] = []
    good: list[bytes] = []
    rows: list[Row] = []
    damaged = 0
    for key, value in due.rows:
        try:
            pending = delayed.read_row(key, value)
            blobs = [blob for blob in pending.blobs if head_of(blob) is not None]
            whole = not pending.damaged and len(blobs) == len(pending.blobs)
        except DamagedRecord:
            blobs, whole = [], False
        if not whole:
            damaged += 1
            rows.append((Table.QUARANTINE, key, value))
        rows.append((Table.DELAYED, key, None))
        good += blobs
        taken.append((key, delayed.size_of(key, value).messages, len(value)))
    return _Page(taken, good, rows, damaged, due.next_ms)


async def _count(core: Core) -> None:
    """Count what waits since before this start, a page at a time; what comes is counted when it is stored."""
    delays = core.delays
    while True:
        async with delays.lock:
            page = await trio.to_thread.run_sync(delayed.sizes, core.store.tables, delays.counted_to, READ_BYTES)
            for row in page:
                if not delays.is_new(row.key):
                    delays.messages += row.messages
                    delays.size += row.size
            delays.counted_to = page[-1].key if page else delayed.KEYS_END
        if not page:
            return
        await trio.sleep(COUNT_PAUSE_SECONDS)
