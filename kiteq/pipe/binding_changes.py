"""Changes of bindings: written before what they route, answered when durable.

A new subscription with start="first" also takes over what was kept because no group was bound to it.
That is copied into the log for it alone, oldest first, before it takes part in routing, so it sees
the order of acceptance. The last copy and the activation are submitted in one turn: nothing can fall
between. A crash on the way leaves an inactive row, which recovery drops; the client binds again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from kiteq.binding.bindings import Binding
from kiteq.binding.matching import Matcher
from kiteq.errors import Refused, StoreError
from kiteq.limits import READ_BYTES, UNROUTED_SECONDS_MAX
from kiteq.pipe.leases import Chunk, Origin
from kiteq.pipe.outlet import Outlet
from kiteq.pipe.settlement import head_of
from kiteq.store.tables import SEQUENCE_KEY, Table
from kiteq.store.writer import Append, Submission

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["bind", "discard", "unbind"]

Done = Callable[[StoreError | Refused | None], None]


def bind(core: Core, group: str, bindings: Sequence[Binding], done: Done) -> None:
    """Add or update bindings of a group; `done` is called when they are durable and in force, or refused."""
    try:
        changes = core.router.merged(group, bindings)
    except Refused as refused:
        done(refused)
        return
    taking_over: dict[str, Outlet] = {}
    outlets: dict[str, Outlet] = {}
    for topic, all_bindings in changes.items():
        if core.router.known(group, topic):
            continue
        outlet = core.router.new_outlet(group, topic, all_bindings)
        outlet.matchers = tuple(Matcher(binding) for binding in all_bindings)
        if any(binding.start == "first" for binding in all_bindings):
            taking_over[topic] = outlet
        outlets[topic] = outlet
    if not taking_over:
        core.router.put(group, changes, outlets, done)
        return
    assert core.deliveries.nursery is not None
    core.deliveries.nursery.start_soon(_take_over_and_put, core, group, bindings, outlets, taking_over, done)


async def _take_over_and_put(
    core: Core,
    group: str,
    bindings: Sequence[Binding],
    outlets: dict[str, Outlet],
    taking_over: dict[str, Outlet],
    done: Done,
) -> None:
    await _take_over(core, taking_over)
    for topic in list(outlets):
        if core.router.known(group, topic):
            del outlets[topic]  # another connection of the group was faster
    try:
        changes = core.router.merged(group, bindings)
    except Refused as refused:
        done(refused)
    else:
        core.router.put(group, changes, outlets, done)
    core.turn.end()


async def _take_over(core: Core, outlets: dict[str, Outlet]) -> None:
    """Copy kept messages that the outlets match into the log; when it returns none is left to copy."""
    store = core.store
    submission = Submission(lambda _error: None)
    for outlet in outlets.values():
        store.save_subscription(outlet.subscription, submission, active=False)
    store.writer.submit(submission)
    starts = dict.fromkeys(outlets, 0)
    await _copy_kept(core, outlets, starts, cut=False)
    # What came meanwhile is little; what comes while that is copied is noted, so that there is an end.
    for outlet in outlets.values():
        outlet.subscription.topic.watchers[outlet.subscription.number] = []
    await _copy_kept(core, outlets, starts, cut=True)
    for outlet in outlets.values():
        for append in outlet.subscription.topic.watchers.pop(outlet.subscription.number):
            _copy(core, outlet, append.blobs, append.accepted_ms)
        outlet.reading = True  # else a member that is there already could be served from behind the copies
        core.store.on_durable(partial(_let_read, core, outlet))


def _let_read(core: Core, outlet: Outlet) -> None:
    outlet.reading = False
    core.turn.outlets[outlet] = None


async def _copy_kept(core: Core, outlets: dict[str, Outlet], starts: dict[str, int], *, cut: bool) -> None:
    """Copy what has been submitted by now, from the sequences `starts` on, which are moved on.

    cut: leave out what was submitted later but came into the same record.
    """
    ends = {topic: outlet.subscription.topic.next_sequence for topic, outlet in outlets.items()}
    await _committed(core)
    for topic, outlet in outlets.items():
        end = ends[topic]
        while starts[topic] < end:
            read = partial(core.store.read_unrouted, outlet.subscription.topic, starts[topic], READ_BYTES)
            rows = await trio.to_thread.run_sync(read)
            starts[topic] = SEQUENCE_KEY.unpack(rows[-1][0])[1] + 1 if rows else end
            for _, record in rows:
                if record is not None:
                    below = bisect_left(record.sequences, end) if cut else len(record.blobs)
                    _copy(core, outlet, record.blobs[:below], record.accepted_ms)
                    starts[topic] = max([starts[topic], *record.sequences[-1:]])


async def _committed(core: Core) -> None:
    """Wait until all that was submitted so far is durable."""
    finished = trio.Event()
    core.store.on_durable(finished.set)
    await finished.wait()


def _copy(core: Core, outlet: Outlet, kept: list[bytes], accepted_ms: int) -> None:
    now_ms = core.clock.epoch_ms()
    blobs: list[bytes] = []
    expires_ms = accepted_ms + int(UNROUTED_SECONDS_MAX * 1000)
    for blob in kept:
        head = head_of(blob)
        if head is None or accepted_ms + head.ttl_ms <= now_ms:
            continue
        if outlet.matches(head.message_type):
            blobs.append(blob)
            expires_ms = min(expires_ms, accepted_ms + head.ttl_ms)
    if not blobs:
        return
    subscription, topic = outlet.subscription, outlet.subscription.topic
    append = Append(
        Table.LOG, topic.number, topic.next_sequence, blobs, [(len(blobs), (subscription.number,))],
        accepted_ms, expires_ms,
    )  # fmt: skip
    topic.next_sequence += len(blobs)
    submission = Submission(lambda _error: None)
    submission.appends.append(append)
    subscription.pending += len(blobs)
    subscription.pending_bytes += sum(map(len, blobs))
    outlet.behind = True
    core.store.writer.submit(submission)


def unbind(core: Core, group: str, topic: str, kind: int, pattern: str, done: Done) -> bool:
    """Remove one binding; with the last one of a topic the group leaves it. Return whether it was there."""
    outlet = core.deliveries.group(group).outlets.get(topic)
    if outlet is None:
        return False
    bindings = core.router.submitted(group, topic)  # with those that are not durable yet
    kept = tuple(binding for binding in bindings if (binding.kind, binding.pattern) != (kind, pattern))
    if len(kept) == len(bindings):
        return False
    if kept:
        core.router.put(group, {topic: kept}, {}, done)
    else:
        drop(core, outlet, done)
    return True


def drop(core: Core, outlet: Outlet, done: Done) -> None:
    """Let a group leave a topic with all it is owed there; `done` when that is durable."""
    core.router.close(outlet)
    for member in outlet.group.members:
        for lease in member.leases():
            if lease.outlet is outlet:
                for start, stop in lease.take(0, len(lease.blobs)):
                    core.deliveries.settlement.hand_back(lease, start, stop)
                member.release(lease)
    outlet.closed = True
    submission = Submission(done)
    core.store.save_subscription(outlet.subscription, submission, active=False)
    core.store.writer.submit(submission)
    assert core.deliveries.nursery is not None
    core.deliveries.nursery.start_soon(_discard_and_forget, core, outlet)


async def _discard_and_forget(core: Core, outlet: Outlet) -> None:
    await discard(core, outlet, outlet.subscription.topic.next_sequence)
    for table in (Table.DEAD, Table.DUE, Table.RETRY):
        keys = await trio.to_thread.run_sync(core.store.read_keys, outlet.subscription, table)
        while keys:
            submission = Submission(lambda _error: None, urgent=False)
            submission.rows += [(table, key, None) for key in keys]
            core.store.writer.submit(submission)
            keys = await trio.to_thread.run_sync(core.store.read_keys, outlet.subscription, table, keys[-1])
    submission = Submission(lambda _error: None, urgent=False)
    core.store.drop_subscription(outlet.subscription, submission)
    core.store.writer.submit(submission)


async def discard(core: Core, outlet: Outlet, below: int) -> int:
    """Settle what an outlet is owed below a sequence, undelivered; return how many messages that were."""
    await _committed(core)
    discarded = await _discard_retries(core, outlet)
    while True:
        while outlet.ready and outlet.ready[0].sequences[0] < below:
            discarded += _settle_unread(core, outlet)
        if outlet.position >= min(below, outlet.subscription.topic.committed):
            break
        outlet.behind = True
        if not outlet.reading:
            outlet.reading = True
            await core.deliveries.load(outlet)
        else:
            await trio.sleep(0.01)  # a read of the log that was under way ends by itself
        core.turn.end()
    core.turn.end()
    return discarded


async def _discard_retries(core: Core, outlet: Outlet) -> int:
    while outlet.reading_retries:  # noqa: ASYNC110 rare, and over in milliseconds
        await trio.sleep(0.01)  # a read of them that was under way ends by itself
    sequences = [sequence for _, sequence in outlet.due]
    outlet.due.clear()
    found = await trio.to_thread.run_sync(core.store.read_retries, outlet.subscription, sequences)
    for sequence, blob, _ in found:
        core.store.forget_retry(outlet.subscription, sequence, len(blob), core.turn.settling())
    outlet.dropped += len(found)
    return len(found)


def _settle_unread(core: Core, outlet: Outlet) -> int:
    chunk: Chunk = outlet.take(1 << 31)
    size = sum(map(len, chunk.blobs))
    submission = core.turn.settling()
    if chunk.origin is Origin.RETRY:
        core.store.forget_retry(outlet.subscription, chunk.sequences[0], size, submission)
    else:
        core.store.settle(outlet.subscription, chunk.sequences, chunk.low, size, submission)
    outlet.dropped += len(chunk.blobs)
    return len(chunk.blobs)
