"""What happens because time has passed: deadlines, due retries, expiry, snapshots, retention, alarms."""

from __future__ import annotations

import heapq
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import trio

from kiteq.limits import (
    DISK_FREE_BYTES_MIN,
    DISK_FREE_SHARE_MIN,
    READ_BYTES,
    RECONNECT_GRACE_SECONDS,
    SNAPSHOT_SECONDS,
    STORE_ALARM_SHARE,
    STORE_REFUSE_SHARE,
    TTL_MS_MAX,
    UNROUTED_BYTES_MAX,
    UNROUTED_SECONDS_MAX,
)
from kiteq.pipe.binding_changes import discard
from kiteq.pipe.leases import Chunk, retry_chunk
from kiteq.pipe.settlement import head_of
from kiteq.store import records
from kiteq.store.tables import SEQUENCE_KEY, Table
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.outlet import Outlet
    from kiteq.store.state import TopicLog

__all__ = ["run_timers"]

TICK_SECONDS: Final = 0.1
"""Watermarks, warm-up, due retries and ack deadlines are looked at this often."""
IDLE_TICK_SECONDS: Final = 0.5
"""While nobody is connected nothing can go out."""
CHECK_SECONDS: Final = 1.0
"""Free disk, the store's size and absent groups are looked at this often."""
SWEEP_SECONDS: Final = 30.0
"""Expired and mostly settled messages, and old unrouted ones, are looked for this often."""
REWRITE_AGE_SECONDS: Final = 60.0
"""A record younger than this is usually settled whole soon."""
REWRITES_PER_SWEEP: Final = 1_000

log = structlog.get_logger()


async def run_timers(core: Core) -> None:
    """Run all timers until cancelled."""
    # Taken before anything is waited for: nothing has been submitted since the start.
    ends = {topic: topic.next_sequence for topic in core.store.topics.values()}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tick, core)
        nursery.start_soon(_check, core, nursery)
        nursery.start_soon(_snapshots, core)
        nursery.start_soon(_sweep, core)
        nursery.start_soon(_unrouted, core, ends)


async def _tick(core: Core) -> None:
    while True:
        await trio.sleep(TICK_SECONDS if core.peers else IDLE_TICK_SECONDS)
        now, now_ms = core.clock.monotonic(), core.clock.epoch_ms()
        for peer in list(core.peers):
            for lease in reversed(peer.leases()):  # each goes to the front, so the oldest comes last
                if now >= lease.deadline:
                    for start, stop in lease.take(0, len(lease.blobs)):
                        for index in reversed(range(start, stop)):
                            core.deliveries.settlement.failed(lease, index, "no ack before the deadline", None)
                    peer.release(lease)
        for outlet in core.router.outlets():
            waits = outlet.ready or outlet.fly or (outlet.behind and not outlet.reading)
            if (outlet.due and outlet.due[0][0] <= now_ms) or (waits and outlet.group.consuming):
                core.turn.outlets[outlet] = None
        core.turn.end()


async def _check(core: Core, nursery: trio.Nursery) -> None:
    discarding: set[Outlet] = set()
    while True:
        core.duplicates.rotate(core.clock.monotonic(), core.store.last_commit)
        await _check_room(core)
        now = core.clock.monotonic()
        for outlet in core.router.outlets():
            absent = outlet.group.absent_since
            subscription = outlet.subscription
            gone = absent is not None and now - absent >= RECONNECT_GRACE_SECONDS
            owed = subscription.pending or subscription.retrying
            if gone and owed and not subscription.persistent and outlet not in discarding:
                discarding.add(outlet)
                nursery.start_soon(_discard_of_absent, core, outlet, discarding)
        await trio.sleep(CHECK_SECONDS)


async def _discard_of_absent(core: Core, outlet: Outlet, discarding: set[Outlet]) -> None:
    """Drop what a non-persistent group is owed, as long as it stays away; `discarding` holds the outlet meanwhile."""
    subscription, absent_since = outlet.subscription, outlet.group.absent_since
    below = subscription.topic.next_sequence

    def wanted() -> bool:
        return outlet.group.absent_since == absent_since and not outlet.closed

    dropped = await discard(core, outlet, below, wanted=wanted)
    discarding.remove(outlet)
    log.info(
        "dropped the messages of an absent non-persistent group",
        group=subscription.group,
        topic=subscription.topic.name,
        messages=dropped,
    )


async def _check_room(core: Core) -> None:
    usage = await trio.to_thread.run_sync(core.store.usage)
    free_min = core.settings.disk_free_min
    if free_min is None:
        free_min = max(DISK_FREE_BYTES_MIN, int(usage.disk_size * DISK_FREE_SHARE_MIN))
    free_min = min(free_min, usage.disk_size // 2)
    before = core.refusing
    if usage.used >= usage.limit * STORE_REFUSE_SHARE:
        core.refusing = (
            "store_full",
            f"the store uses {usage.used} of {usage.limit} bytes; consume, or raise --store-limit",
        )
    elif usage.disk_free < free_min:
        core.refusing = (
            "disk_full",
            f"the disk has {usage.disk_free} bytes free, {free_min} are needed; make room, or lower --disk-free-min",
        )
    else:
        core.refusing = None
        _check_quotas(core)
    if core.refusing is not None:
        if before is None or before[0] != core.refusing[0]:  # the reason has figures, which change all the time
            log.error("publishing is refused", reason=core.refusing[1])
    elif before is not None:
        log.info("publishing is accepted again")
    full = usage.used >= usage.limit * STORE_ALARM_SHARE
    if full and not core.filling_up:
        log.warning("the store fills up", used=usage.used, limit=usage.limit)
    core.filling_up = full


def _check_quotas(core: Core) -> None:
    """Note the topics that groups over their quota fill; the check handler refuses those only."""
    kept: dict[str, int] = {}
    for outlet in core.router.outlets():
        kept[outlet.group.name] = kept.get(outlet.group.name, 0) + outlet.subscription.kept_bytes
    quota = core.settings.group_quota
    near = {name for name, size in kept.items() if size >= quota * STORE_ALARM_SHARE}
    for name in near - core.near_quota:
        log.warning("a group nears its quota; its topics will be refused", group=name, kept=kept[name], quota=quota)
    core.near_quota = near
    full = {name for name, size in kept.items() if size >= quota}
    before = core.full_topics
    core.full_topics = {
        outlet.subscription.topic.name: outlet.group.name
        for outlet in core.router.outlets()
        if outlet.group.name in full and outlet.subscription.kept_bytes
    }
    if before != core.full_topics:
        log.warning("topics refused because a group is over its quota", topics=core.full_topics)


async def _snapshots(core: Core) -> None:
    while True:
        await trio.sleep(SNAPSHOT_SECONDS)
        core.turn.submit()  # the cursors hold what is settled there
        core.store.submit_snapshot()


async def _sweep(core: Core) -> None:
    while True:
        for topic in list(core.store.topics.values()):
            await _sweep_topic(core, topic)
        core.deliveries.forget_groups({group for group, _ in core.taking_over})  # those are about to have one
        await trio.sleep(SWEEP_SECONDS)


async def _sweep_topic(core: Core, topic: TopicLog) -> None:
    """Bury what has expired, and rewrite what is mostly settled."""
    for outlet in [one for one in core.router.outlets() if one.subscription.topic is topic]:
        if not outlet.closed:
            core.deliveries.bury_expired(outlet)
            await _bury_expired_retries(core, outlet)
    core.turn.end()
    rewritten = 0
    for segment in topic.index.segments(core.clock.epoch_ms() // 1000):
        await trio.lowlevel.checkpoint()  # millions of records must not stall the loop
        for first in segment.expired:
            await _bury_expired(core, topic, first)
        for first in segment.mostly_settled:
            rewritten += await _rewrite(core, topic, first)
            if rewritten >= REWRITES_PER_SWEEP:
                return


async def _bury_expired(core: Core, topic: TopicLog, first: int) -> None:
    """Bury what has expired of a record and only waits in the log; what is in memory its outlet buries."""
    key = SEQUENCE_KEY.pack(topic.number, first)
    raw = await trio.to_thread.run_sync(core.store.read_raw, topic, first)
    if raw is None or topic.index.entry(first) is None:
        return
    try:
        record = records.read(key, raw)
    except records.DamagedRecord:
        return
    outlets = {one.subscription.number: one for one in core.router.outlets() if one.subscription.topic is topic}
    now_ms = core.clock.epoch_ms()
    next_ms = now_ms + TTL_MS_MAX
    for sequence, blob, owners in zip(record.sequences, record.blobs, record.owners, strict=True):
        head = head_of(blob)
        expires_ms = next_ms if head is None else record.accepted_ms + head.ttl_ms
        if expires_ms > now_ms:
            next_ms = min(next_ms, expires_ms)
            continue
        for outlet in [outlets[number] for number in owners if number in outlets]:
            if sequence in outlet.subscription.cursor:
                continue
            if sequence < outlet.position:
                next_ms = expires_ms
            else:
                late = Chunk(range(sequence, sequence + 1), sequence, [blob], record.accepted_ms, expires_ms)
                core.deliveries.settlement.expired(outlet, late)
    topic.index.set_expiry(first, next_ms)
    core.turn.end()


async def _bury_expired_retries(core: Core, outlet: Outlet) -> None:
    """Bury what an absent group would have been given again; a group that is there finds it when it is due."""
    now_ms = core.clock.epoch_ms()
    due = [sequence for due_ms, sequence in outlet.due if due_ms <= now_ms]
    if not due or outlet.group.consuming:
        return
    read = partial(core.store.read_retries, outlet.subscription, due, expired_ms=now_ms)
    late = {row[0]: row for row in await trio.to_thread.run_sync(read)}
    for due_ms, sequence in list(outlet.due):
        if sequence in late and not outlet.closed:
            outlet.due.remove((due_ms, sequence))
            core.deliveries.settlement.expired(outlet, retry_chunk(*late[sequence]))
    heapq.heapify(outlet.due)


async def _rewrite(core: Core, topic: TopicLog, first: int) -> bool:
    """Replace an old, mostly settled record by one with only what is still owed."""
    key = SEQUENCE_KEY.pack(topic.number, first)
    raw = await trio.to_thread.run_sync(partial(core.store.read_raw, topic, first))
    current = topic.index.entry(first)
    if raw is None or current is None:
        return False
    try:
        record = records.read(key, raw)
    except records.DamagedRecord:
        return False
    if record.accepted_ms > core.clock.epoch_ms() - REWRITE_AGE_SECONDS * 1000 or record.damaged:
        return False
    blobs: list[bytes] = []
    relative: list[int] = []
    runs: list[records.Run] = []
    for sequence, blob, owners in zip(record.sequences, record.blobs, record.owners, strict=True):
        owing = tuple(
            number
            for number in owners
            if (one := core.store.subscriptions.get(number)) is not None and sequence not in one.cursor
        )
        if owing:
            blobs.append(blob)
            relative.append(sequence - first)
            runs.append((1, owing))
    owed = sum(len(owners) for _, owners in runs)
    if owed != current.owed or not blobs:
        return False  # something is on its way that this does not see; the next sweep looks again
    submission = Submission(urgent=False)
    value = records.build(key, blobs, records.join_runs(runs), record.accepted_ms, record.expires_ms, relative)
    submission.rows.append((Table.LOG, key, value))
    topic.index.replace(first, owed)
    core.store.writer.submit(submission)
    return True


async def _unrouted(core: Core, ends: dict[TopicLog, int]) -> None:
    """Drop messages no group was bound to when they are too old, or too many: the oldest first."""
    await _measure_unrouted(core, ends)
    looked_at = core.clock.monotonic()
    while True:
        await trio.sleep(CHECK_SECONDS)
        if core.unrouted_bytes > UNROUTED_BYTES_MAX or core.clock.monotonic() - looked_at > SWEEP_SECONDS:
            looked_at = core.clock.monotonic()
            while await _trim_unrouted(core):
                pass


async def _measure_unrouted(core: Core, ends: dict[TopicLog, int]) -> None:
    """Count what was kept before this start; what comes is counted when it is submitted."""
    for topic, end in ends.items():
        start = 0
        while start < end:
            read = partial(core.store.read_unrouted_sizes, topic, start, READ_BYTES)
            sizes = await trio.to_thread.run_sync(read)
            before = [size for key, size, _ in sizes if SEQUENCE_KEY.unpack(key)[1] < end]
            core.unrouted_bytes += sum(before)
            start = SEQUENCE_KEY.unpack(sizes[-1][0])[1] + 1 if sizes else end


async def _trim_unrouted(core: Core) -> bool:
    """Drop some of the oldest; return whether there may be more to drop."""
    found: list[tuple[bytes, int, int]] = []
    for topic in list(core.store.topics.values()):
        found += await trio.to_thread.run_sync(core.store.read_unrouted_sizes, topic, 0, READ_BYTES)
    oldest_ms = core.clock.epoch_ms() - int(UNROUTED_SECONDS_MAX * 1000)
    submission = Submission(urgent=False)
    for key, size, accepted_ms in sorted(found, key=lambda one: one[2]):
        if accepted_ms >= oldest_ms and core.unrouted_bytes <= UNROUTED_BYTES_MAX:
            break
        submission.rows.append((Table.UNROUTED, key, None))
        core.unrouted_bytes -= size
    if not submission.rows:
        return False
    core.counters["unrouted_dropped_records"] += len(submission.rows)
    await core.store.write(submission)
    return len(submission.rows) == len(found)
