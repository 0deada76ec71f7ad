"""What happens to undecided transactions because time has passed: checks, figures, and tidying their rows."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog
import trio

from kiteq.errors import KiteQError
from kiteq.limits import DECISION_KEEP_SECONDS
from kiteq.store.half_reading import rewritten
from kiteq.store.half_records import COUNTER_KEY, parse_decisions
from kiteq.store.half_recovery import clean_row
from kiteq.store.tables import Table
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.store.tables import Row, Tables

__all__ = ["run_checks"]

TICK_SECONDS: Final = 0.1
"""Due checks are looked for this often while anything is undecided."""
FIGURES_SECONDS: Final = 5.0
"""The age of the oldest transaction of each group is found out this often."""
SLOTS_PER_STEP: Final = 10_000
"""Slots looked at before other tasks get their turn: about a millisecond."""
TIDY_SECONDS: Final = 30.0
"""Rows with decided transactions in them are rewritten this often, and old decisions dropped."""
REWRITTEN_BYTES: Final = 8 << 20
"""Rewritten rows that wait for the disk at a time."""
TRIM_BYTES: Final = 1 << 20
"""Old decisions read and dropped in one piece."""

log = structlog.get_logger()


async def run_checks(core: Core) -> None:
    """Run what undecided transactions need until cancelled."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_ask, core)
        nursery.start_soon(_measure, core)
        nursery.start_soon(_tidy, core)


async def _ask(core: Core) -> None:
    while True:
        if not len(core.store.halves):
            core.checks.planned = trio.Event()
            await core.checks.planned.wait()
        await trio.sleep(TICK_SECONDS)
        await core.checks.ask_due()


async def _measure(core: Core) -> None:
    """Find out how old the oldest undecided transaction of each group is."""
    halves = core.store.halves
    while True:
        oldest: dict[int, int] = {}
        for start in range(0, len(halves.state), SLOTS_PER_STEP):
            stop = min(start + SLOTS_PER_STEP, len(halves.state))
            for slot in range(start, stop):
                if halves.state[slot]:
                    group = halves.group[slot]
                    oldest[group] = min(oldest.get(group, 1 << 32), halves.prepared_s[slot])
            await trio.lowlevel.checkpoint()
        now_s = core.clock.epoch_ms() // 1000
        for number, tally in enumerate(halves.groups):
            tally.oldest_s = oldest.get(number, 0)
            late = tally.oldest_s > 0 and now_s - tally.oldest_s >= core.settings.half_age_alarm
            if late and not tally.alarmed:
                log.warning(
                    "a transaction has been open for long; see kiteq tx list",
                    group=tally.name,
                    age_s=now_s - tally.oldest_s,
                )
            tally.alarmed = late
        await trio.sleep(FIGURES_SECONDS)


async def _tidy(core: Core) -> None:
    while True:
        await trio.sleep(TIDY_SECONDS)
        await tidy(core)


async def tidy(core: Core) -> None:
    """Rewrite rows in which some transactions are decided, then drop decisions nobody needs any more.

    A decision may go only when no row of half messages names its transaction: such a row would be taken for
    undecided at the next start.
    """
    halves = core.store.halves
    if halves.clean_below < halves.next_decision:
        below = halves.next_decision
        await core.store.all_durable()  # earlier decisions are final now, so their transactions are not in memory
        written = 0
        for row in list(halves.touched):
            written += await _rewrite(core, row)
            if written >= REWRITTEN_BYTES:
                await core.store.all_durable()
                written = 0
        halves.clean_below = below
        submission = Submission()
        submission.rows.append(clean_row(halves))
        await core.store.write(submission)
    await _trim(core)


async def _rewrite(core: Core, row: int) -> int:
    """Leave only the undecided transactions in a row, if there are any; return how many bytes are written.

    A damaged row goes to quarantine.
    """
    halves, key = core.store.halves, COUNTER_KEY.pack(row)
    value = await trio.to_thread.run_sync(core.store.tables.get, Table.HALF, key)
    while halves.is_leaving(row):
        await core.store.all_durable()
    halves.touched.pop(row, None)
    if not halves.is_live(row) or value is None:
        return 0
    submission = Submission(urgent=False)
    new = rewritten(row, value, halves.undecided)
    if new is None:
        core.store.damaged_records += 1
        log.error("a row of half messages is damaged, and was put into quarantine", row=row)
        submission.rows += [(Table.QUARANTINE, key, value), (Table.HALF, key, None)]
    else:
        submission.rows.append(new)
    core.store.writer.submit(submission)
    return len(value)


async def _trim(core: Core) -> None:
    """Drop old decisions, and with each of their transactions what is known of its checks."""
    halves = core.store.halves
    end = COUNTER_KEY.pack(halves.clean_below)
    while True:
        page = await trio.to_thread.run_sync(_old_decisions, core.store.tables, end, core.clock.epoch_ms())
        if not page:
            return
        submission = Submission()
        submission.rows += page
        await core.store.write(submission)


def _old_decisions(tables: Tables, end: bytes, now_ms: int) -> list[Row]:
    """Return the deletions for a page of decisions that nobody needs any more; called in a thread.

    What was decided before an old one is old, too. That is told of damaged rows, and of those written while the
    clock of an earlier run was ahead.
    """
    oldest_ms = now_ms - int(DECISION_KEEP_SECONDS * 1000)
    old: list[Row] = []
    unclear: list[Row] = []
    start = b""
    while not old and (page := tables.scan(Table.DECISIONS, start, end, bytes_max=TRIM_BYTES)):
        for key, value in page:
            unclear.append((Table.DECISIONS, key, None))
            with suppress(KiteQError):
                decided = parse_decisions(key, value)
                asked = [one.handle for one in decided.decisions if one.asked]
                unclear += [(Table.CHECKS, COUNTER_KEY.pack(handle), None) for handle in asked]
                if decided.at_ms < oldest_ms:
                    old += unclear
                    unclear = []
                elif decided.at_ms <= now_ms:
                    return old
        start = page[-1][0] + b"\0"
    return old
