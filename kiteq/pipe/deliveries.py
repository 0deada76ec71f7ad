"""Hands each group's next messages to its least loaded member.

Theory of operation. An outlet's messages are in memory (ready), at a member (leased), waiting for
another attempt (retry), or only in the log (from `position` on, when `behind`). Dispatch moves ready
ones to members with credit. When little is ready and the log holds more, a thread reads on; the loop
never touches the disk. Losing a member puts what it held back to the front.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

import trio

from kiteq.limits import READ_BYTES
from kiteq.pipe.groups import Group
from kiteq.pipe.leases import Chunk, Lease, Origin, retry_chunk
from kiteq.pipe.outlet import DELIVER_BYTES_MAX, Outlet
from kiteq.pipe.settlement import Settlement, head_of
from kiteq.remoting.packets import Deliver

if TYPE_CHECKING:
    from kiteq.clock import Clock
    from kiteq.config import Settings
    from kiteq.pipe.peer import Peer
    from kiteq.pipe.turn import Turn
    from kiteq.store.state import Loaded
    from kiteq.store.store import Store

__all__ = ["Deliveries"]

LOAD_BYTES = 2 * READ_BYTES
"""Read from the log at once: a thread hand-over costs 80 us, so not less."""
READY_LOW_BYTES = READ_BYTES
"""Read on when less than this is ready."""
RETRIES_LOADED = 256
"""Due retries read at once."""
RETRIES_LOADED_BYTES = 4 << 20
"""The same in bytes, unless a single message is larger."""
FLY_SEQUENCE = 0


class Deliveries:
    """All groups of a broker, and the dispatching of their messages.

    nursery: where reads of the log run; set while the broker runs.
    """

    def __init__(self, store: Store, clock: Clock, settings: Settings, turn: Turn, counters: Counter[str]) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings
        self._turn = turn
        self._counters = counters
        self.settlement = Settlement(store, clock, turn, counters)
        self.groups: dict[str, Group] = {}
        self.nursery: trio.Nursery | None = None
        turn.dispatch = self.dispatch

    def group(self, name: str) -> Group:
        """Return a group, made when new."""
        group = self.groups.get(name)
        if group is None:
            group = self.groups[name] = Group(name, self._clock.monotonic())
        return group

    def forget_groups(self, kept: Collection[str]) -> None:
        """Forget groups that have neither members nor subscriptions, as each `kiteq listen` leaves one."""
        for name in [one.name for one in self.groups.values() if not (one.members or one.outlets)]:
            if name not in kept:
                del self.groups[name]

    def take_due(self, due: list[tuple[int, int, int]]) -> None:
        """Take (subscription, sequence, due ms) of what waited for another attempt before a restart."""
        by_number = {
            outlet.subscription.number: outlet for group in self.groups.values() for outlet in group.outlets.values()
        }
        for number, sequence, due_ms in due:
            by_number[number].due.append((due_ms, sequence))
        for outlet in by_number.values():
            heapq.heapify(outlet.due)

    # --- members ------------------------------------------------------------------------------

    def join(self, peer: Peer) -> bool:
        """Add a connection to its group; return whether it is the first."""
        group = self.group(peer.group)
        group.members.append(peer)
        group.absent_since = None
        return len(group.members) == 1

    def leave(self, peer: Peer, *, goodbye: bool) -> bool:
        """Remove a connection and give back what it held; return whether nobody of the group is left.

        Without a goodbye, its oldest `concurrency` messages count as failed: those being handled.
        """
        group = self.group(peer.group)
        if peer not in group.members:
            return False
        group.members.remove(peer)
        handled = 0 if goodbye else peer.concurrency
        returned: list[tuple[Lease, int, int, int]] = []
        for lease in peer.leases():
            for start, stop in lease.take(0, len(lease.blobs)):
                failed = min(handled, stop - start)
                handled -= failed
                returned.append((lease, start, start + failed, stop))
            peer.release(lease)
        for lease, start, unstarted, stop in reversed(returned):  # each goes to the front, so the oldest comes last
            if unstarted < stop:
                self.settlement.hand_back(lease, unstarted, stop)
            for index in reversed(range(start, unstarted)):
                self.settlement.failed(lease, index, "the connection broke while the message was held", None)
        for outlet in group.outlets.values():
            if not group.consuming:
                outlet.forget_untouched()
            self._turn.outlets[outlet] = None
        if not group.members:
            group.absent_since = self._clock.monotonic()
        return not group.members

    def credit(self, peer: Peer, window: int) -> None:
        """Set how many messages a connection may hold."""
        peer.window = window
        for outlet in self.group(peer.group).outlets.values():
            self._turn.outlets[outlet] = None

    # --- dispatch -----------------------------------------------------------------------------

    def dispatch(self, outlet: Outlet) -> None:
        """Hand out what is ready while there is credit; read on when little is left."""
        if outlet.closed:
            return
        now = self._clock.monotonic()
        group = outlet.group
        while outlet.fly or self._may_go(outlet):
            member, count = group.best_member(now)
            if member is None or count <= 0:
                break
            count = min(count, outlet.allowance(now))
            if count <= 0:
                break
            chunk = self._fly_chunk(outlet, count) if outlet.fly else self._unexpired(outlet, outlet.take(count))
            if chunk is not None:
                self._hand_out(outlet, chunk, member, now)
        if outlet.fly and not group.consuming:
            outlet.forget_untouched()
        if outlet.ready_bytes < READY_LOW_BYTES and group.consuming and self.nursery is not None:
            self._read_on(outlet, self.nursery)

    @staticmethod
    def _may_go(outlet: Outlet) -> bool:
        """Return whether the next message may be handed out; first deliveries pause while retries are full."""
        if not outlet.ready or not outlet.retries_full:
            return bool(outlet.ready)
        return outlet.ready[0].origin is Origin.RETRY or outlet.ready[0].failures > 0

    def _hand_out(self, outlet: Outlet, chunk: Chunk, member: Peer, now: float) -> None:
        outlet.use_allowance(len(chunk.blobs))
        lease = Lease(member, outlet, chunk, now + self._settings.ack_deadline, now + self._settings.max_hold)
        member.hold(lease)
        outlet.leased += lease.open
        self._counters["delivered"] += lease.open
        member.send(Deliver(0, lease.first_tag, chunk.failures + 1, chunk.blobs))
        if self._store.forgets and chunk.origin is Origin.LOG:
            self._store.settle(outlet.subscription, chunk.sequences, chunk.low, lease.size, self._turn.settling())

    @staticmethod
    def _fly_chunk(outlet: Outlet, count: int) -> Chunk:
        blobs = [outlet.fly.popleft()]
        size = len(blobs[0])
        while outlet.fly and len(blobs) < count and size + len(outlet.fly[0]) <= DELIVER_BYTES_MAX:
            size += len(outlet.fly[0])
            blobs.append(outlet.fly.popleft())
        return Chunk(range(FLY_SEQUENCE, FLY_SEQUENCE + len(blobs)), 0, blobs, 0, 0, Origin.FLY)

    def _unexpired(self, outlet: Outlet, chunk: Chunk) -> Chunk | None:
        """Return what of a chunk may still be delivered; the rest goes to the dead letters."""
        now_ms = self._clock.epoch_ms()
        if now_ms < chunk.expires_ms:
            return chunk
        late = [
            index
            for index, blob in enumerate(chunk.blobs)
            if (head := head_of(blob)) is not None and chunk.accepted_ms + head.ttl_ms <= now_ms
        ]
        if not late:
            return chunk
        if len(late) < len(chunk.blobs):
            for start, stop in reversed(_runs_without(late, len(chunk.blobs))):
                outlet.put_back(chunk.part(start, stop))
        for index in late:
            self.settlement.expired(outlet, chunk.part(index, index + 1))
        return None

    def bury_expired(self, outlet: Outlet) -> None:
        """Move what has expired of an outlet's ready messages to the dead letters."""
        kept: list[Chunk] = []
        while outlet.ready:
            chunk = self._unexpired(outlet, outlet.take(1 << 31))
            if chunk is not None:
                kept.append(chunk)
        for chunk in reversed(kept):
            outlet.put_back(chunk)

    # --- reading on ---------------------------------------------------------------------------

    def _read_on(self, outlet: Outlet, nursery: trio.Nursery) -> None:
        now_ms = self._clock.epoch_ms()
        if outlet.due and outlet.due[0][0] <= now_ms and not outlet.reading_retries:
            outlet.reading_retries = True
            due: list[tuple[int, int]] = []
            while outlet.due and outlet.due[0][0] <= now_ms and len(due) < RETRIES_LOADED:
                due.append(heapq.heappop(outlet.due))
            nursery.start_soon(self._load_retries, outlet, due)
        if outlet.retries_full:
            return  # first deliveries wait until the retries have shrunk
        if outlet.behind and not outlet.reading:
            outlet.reading = True
            nursery.start_soon(self.load, outlet)

    async def load(self, outlet: Outlet) -> None:
        """Read on in the log; `outlet.reading` was set by the caller and ends with it."""
        topic = outlet.subscription.topic
        below = topic.committed
        position = outlet.position
        start = topic.index.at_or_before(position)
        read = partial(self._store.read_log, outlet.subscription, start, below, LOAD_BYTES, position)
        loaded = await trio.to_thread.run_sync(read)
        outlet.reading = False
        if outlet.position == position:  # else memory was given up meanwhile, and what was read lies behind a gap
            self.take_loaded(outlet, loaded)
        outlet.behind = outlet.position < topic.committed
        self._turn.outlets[outlet] = None
        self._turn.end()

    def take_loaded(self, outlet: Outlet, loaded: list[Loaded]) -> None:
        """Add what was read from the log, but for what is settled or already in memory."""
        cursor = outlet.subscription.cursor
        for sequences, blobs, accepted_ms, expires_ms, damaged in loaded:
            for sequence in damaged:
                if sequence >= outlet.position and sequence not in cursor:
                    self.settlement.damaged(outlet, sequence, sequence)
            if not blobs:
                if type(sequences) is range:
                    outlet.position = max(outlet.position, sequences.start)
                continue
            if sequences[0] >= outlet.position and cursor.floor <= outlet.position and not cursor.ranges:
                kept, kept_blobs = sequences, blobs
            else:
                wanted = [
                    index
                    for index, sequence in enumerate(sequences)
                    if sequence >= outlet.position and sequence not in cursor
                ]
                kept, kept_blobs = [sequences[index] for index in wanted], [blobs[index] for index in wanted]
            if kept_blobs:
                low = min(max(outlet.position, cursor.floor), kept[0])
                outlet.append(Chunk(kept, low, kept_blobs, accepted_ms, expires_ms))
            outlet.position = max(outlet.position, sequences[-1] + 1)

    async def _load_retries(self, outlet: Outlet, taken: list[tuple[int, int]]) -> None:
        await self._store.all_durable()  # a short wait may end before the row is on disk
        sequences = [sequence for _, sequence in taken]
        read = partial(self._store.read_retries, outlet.subscription, sequences, bytes_max=RETRIES_LOADED_BYTES)
        found = await trio.to_thread.run_sync(read)
        for sequence, blob, due in found:
            outlet.put_back(retry_chunk(sequence, blob, due))
        if sum(len(blob) for _, blob, _ in found) >= RETRIES_LOADED_BYTES:
            for left in taken[sequences.index(found[-1][0]) + 1 :]:
                heapq.heappush(outlet.due, left)
        outlet.reading_retries = False
        self._turn.outlets[outlet] = None
        self._turn.end()


def _runs_without(gaps: list[int], total: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of what is left of 0..total when the positions in `gaps` are taken out."""
    runs: list[tuple[int, int]] = []
    start = 0
    for gap in [*gaps, total]:
        if gap > start:
            runs.append((start, gap))
        start = gap + 1
    return runs
