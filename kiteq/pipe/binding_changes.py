"""Changes of bindings: written before what they route, answered when durable."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import trio

from kiteq.binding.bindings import Binding
from kiteq.errors import Refused, StoreError
from kiteq.pipe.leases import Chunk, Origin
from kiteq.pipe.outlet import Outlet
from kiteq.pipe.taking_over import TakeOver
from kiteq.store.tables import Table
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["Done", "bind", "discard", "drop", "unbind"]

Done = Callable[[StoreError | Refused | None], None]


def bind(
    core: Core, group: str, bindings: Sequence[Binding], done: Done, without: Collection[tuple[int, str]] = ()
) -> None:
    """Add or update bindings of a group; `done` is called when they are durable and in force, or refused.

    without: kinds and patterns of others that they replace, in the same step: what waits for the group stays.
    """
    if _under_way(core, group, bindings) is None and not _that_take_over(core, group, bindings):
        _put(core, group, bindings, {}, done, without)
        return
    try:
        core.router.merged(group, bindings, without)  # before much is copied for nothing
    except Refused as refused:
        done(refused)
        return
    assert core.deliveries.nursery is not None
    core.deliveries.nursery.start_soon(_take_over_and_put, core, group, bindings, done, without)


def _under_way(core: Core, group: str, bindings: Sequence[Binding]) -> trio.Event | None:
    """Return the end of a take-over of the group in one of the topics."""
    ends = (core.taking_over.get((group, binding.topic)) for binding in bindings)
    return next((end for end in ends if end is not None), None)


def _that_take_over(core: Core, group: str, bindings: Sequence[Binding]) -> dict[str, list[Binding]]:
    """Return, by topic, the bindings that take over what was kept: each does so once.

    One that was there as "latest", for instance because the registry brought it first, does so too.
    """
    found: dict[str, list[Binding]] = {}
    for binding in bindings:
        old = {(one.kind, one.pattern) for one in _in_force(core, group, binding.topic) if one.start == "first"}
        if binding.start == "first" and (binding.kind, binding.pattern) not in old:
            found.setdefault(binding.topic, []).append(binding)
    return found


def _put(
    core: Core, group: str, bindings: Sequence[Binding], outlets: dict[str, Outlet], done: Done,
    without: Collection[tuple[int, str]] = (),
) -> None:  # fmt: skip
    """Merge bindings with those that the group has by now, and write them; `outlets` are new ones by topic."""
    try:
        changes = core.router.merged(group, bindings, without)
    except Refused as refused:
        done(refused)
        return
    for topic, all_bindings in changes.items():
        if topic not in outlets and not core.router.known(group, topic):
            outlets[topic] = core.router.new_outlet(group, topic, all_bindings)
        elif topic in outlets:
            outlets[topic].subscription.bindings = all_bindings
    core.router.put(group, changes, outlets, done)


async def _take_over_and_put(
    core: Core, group: str, bindings: Sequence[Binding], done: Done, without: Collection[tuple[int, str]]
) -> None:
    while (end := _under_way(core, group, bindings)) is not None:
        await end.wait()  # two of one group at once would each copy everything
    found = _that_take_over(core, group, bindings)
    if not found:
        _put(core, group, bindings, {}, done, without)
        core.turn.end()
        return
    assert not without, "what replaces others is from the registry, which knows no start"
    finished = trio.Event()
    for topic in found:
        core.taking_over[group, topic] = finished
    try:
        error = await _take_over(core, group, bindings, found)
    finally:
        for topic in found:
            del core.taking_over[group, topic]
        finished.set()
    done(error)
    core.turn.end()


async def _take_over(
    core: Core, group: str, bindings: Sequence[Binding], found: dict[str, list[Binding]]
) -> StoreError | Refused | None:
    takers: list[TakeOver] = []
    outlets: dict[str, Outlet] = {}
    for topic, first in found.items():
        outlet = core.deliveries.group(group).outlets.get(topic)
        older = _in_force(core, group, topic)
        if outlet is None:
            outlet = outlets[topic] = core.router.new_outlet(group, topic, tuple(first))
        takers.append(TakeOver(core, outlet, new=topic in outlets, bindings=first, older=older))
    with ExitStack() as watching:
        for taker in takers:
            await taker.copy_kept()
        for taker in takers:
            watching.enter_context(taker.watching())
            await taker.copy_rest()
        error = _error_of(takers) or await _put_with_watched(core, group, bindings, outlets, takers)
    if error is not None:
        for taker in takers:
            _undo(core, taker)
    return error


def _in_force(core: Core, group: str, topic: str) -> tuple[Binding, ...]:
    outlet = core.deliveries.group(group).outlets.get(topic)
    return () if outlet is None else outlet.subscription.bindings


def _error_of(takers: Sequence[TakeOver]) -> StoreError | None:
    return next((taker.error for taker in takers if taker.error is not None), None)


async def _put_with_watched(
    core: Core, group: str, bindings: Sequence[Binding], outlets: dict[str, Outlet], takers: Sequence[TakeOver]
) -> StoreError | Refused | None:
    """Copy the last and let the bindings take effect in the same turn; return when both are durable."""
    in_force = trio.Event()
    errors: list[StoreError | Refused] = []

    def done(error: StoreError | Refused | None) -> None:
        errors.extend([error] if error is not None else [])
        for taker in takers:
            taker.copy_watched()  # a subscription that was there before was routed by its older bindings until now
        in_force.set()

    for taker in takers:
        taker.copy_watched()
    _put(core, group, bindings, outlets, done)
    await in_force.wait()
    await core.store.all_durable()
    for taker in takers:
        core.turn.outlets[taker.outlet] = None
    return errors[0] if errors else _error_of(takers)


def _undo(core: Core, taker: TakeOver) -> None:
    """Take back bindings for which not everything was copied; an older subscription keeps what was."""
    outlet = taker.outlet
    subscription = outlet.subscription
    group, topic = subscription.group, subscription.topic.name
    if not taker.new:
        before = {(one.kind, one.pattern): one for one in taker.older}
        kept = tuple(
            old
            for one in subscription.bindings
            if (old := before.get((one.kind, one.pattern)) if one in taker.bindings else one) is not None
        )
        if outlet.closed or kept == subscription.bindings:
            return
        if not kept:  # the others were removed meanwhile
            drop(core, outlet, lambda _error: None)
        else:
            core.router.put(group, {topic: kept}, {}, lambda _error: None)
    elif outlet.group.outlets.get(topic) is outlet:
        drop(core, outlet, lambda _error: None)
    elif not outlet.closed:
        outlet.closed = True
        assert core.deliveries.nursery is not None
        core.deliveries.nursery.start_soon(_discard_and_forget, core, outlet)


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
            submission = Submission(urgent=False)
            submission.rows += [(table, key, None) for key in keys]
            core.store.writer.submit(submission)
            keys = await trio.to_thread.run_sync(core.store.read_keys, outlet.subscription, table, keys[-1])
    submission = Submission(urgent=False)
    core.store.drop_subscription(outlet.subscription, submission)
    core.store.writer.submit(submission)


async def discard(core: Core, outlet: Outlet, below: int, *, wanted: Callable[[], bool] = lambda: True) -> int:
    """Settle what an outlet is owed below a sequence, undelivered; return how many messages that were.

    wanted: the rest is left alone as soon as this is false.
    """
    await core.store.all_durable()
    discarded = await _discard_retries(core, outlet, wanted)
    while wanted():
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


async def _discard_retries(core: Core, outlet: Outlet, wanted: Callable[[], bool]) -> int:
    while outlet.reading_retries:  # noqa: ASYNC110 rare, and over in milliseconds
        await trio.sleep(0.01)  # a read of them that was under way ends by itself
    due = outlet.due.copy()
    outlet.due.clear()
    sequences = [sequence for _, sequence in due]
    found = await trio.to_thread.run_sync(core.store.read_retries, outlet.subscription, sequences)
    if not wanted():
        outlet.due += due
        heapq.heapify(outlet.due)
        return 0
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
