"""Asking producers about undecided transactions: whom, when, and what the answers change.

Theory of operation. Each undecided transaction is in one bucket of a wheel, the time when it is to be asked
about; an entry is good only while the slot's `due` names that bucket. A tick takes what is due, as far as the
cap per second goes, finds out whom to ask, reads the messages in a thread, and asks. The client instance that
prepared is asked while it is connected. When it has been gone for a while, another member of its group is,
if it publishes all topics of the transaction. When there is nobody, the transaction waits for a member to
connect; that uses up nothing, as do no answer and "running". Only "unknown" counts, and enough of them park
the transaction; it is then asked about when a member connects, and every hour, but never decided here.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
import trio

from kiteq.limits import (
    CHECK_AFTER_SECONDS_MAX,
    CHECK_ANSWER_SECONDS,
    CHECK_HISTORY_MAX,
    CHECK_INTERVAL_SECONDS_MAX,
    PARKED_CHECK_SECONDS,
)
from kiteq.pipe.questions import NO_QUESTION, Question, question_of, send_questions
from kiteq.remoting.packets import DECISION_UNKNOWN
from kiteq.store.half_reading import each_half, read_checks
from kiteq.store.half_records import COUNTER_KEY, CheckState, pack_checks
from kiteq.store.halves import State
from kiteq.store.tables import Row, Table
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.peer import Peer

__all__ = ["Checks"]

log = structlog.get_logger()

BUCKET_SHIFT: Final = 6
"""A bucket of the wheel is 64 ms wide."""
JITTER_SHARE: Final = 0.1
"""Up to this much longer, so that what was prepared together is not asked about together for ever."""
GONE_INSTANCES_MAX: Final = 10_000
"""Clients whose departure is remembered; the others are taken to be gone since the start."""
ASK_OUTBOX_BYTES_MAX: Final = 4 << 20
"""A client for which more waits to be sent is asked about the rest later: it would be cut off as slow."""
LATER_SECONDS: Final = 1.0
"""So much later."""
TAKEN_MAX: Final = 2_000
"""Due transactions taken in one tick: those about which nobody can be asked must not hold up the others."""
LOOKED_AT_MAX: Final = 20_000
"""Entries looked at in one tick, most of which may be decided: a few milliseconds."""
UNREADABLE_RETRY_SECONDS: Final = 3_600.0
"""A transaction whose messages cannot be read is tried again this often."""

OPEN: Final = (State.OPEN, State.PARKED)
NEVER_ASKED: Final = CheckState(0, 0, 0, 0, [])


@dataclass(slots=True)
class _Asked:
    """A question that is not answered yet. before: what the disk said of the checks before this one."""

    slot: int
    peer: Peer
    at_ms: int
    deadline: float
    before: CheckState


class Checks:
    """The wheel, the questions under way, and who may be asked."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._halves = core.store.halves
        self._wheel: dict[int, array[int]] = {}
        self._positions: dict[int, int] = {}
        """How much of a bucket was taken already."""
        self._buckets: list[int] = []
        self._asked: dict[int, _Asked] = {}
        """By handle."""
        self._connected: dict[bytes, Peer] = {}
        self._gone: dict[bytes, float] = {}
        """When a client instance was last seen, monotonic seconds."""
        self._waiting: dict[int, array[int]] = {}
        """By group number, slots that somebody should be asked about as soon as a member connects."""
        self._waits = array("I")
        """By slot, in which group's array of those it is: its number and 1, so that it is there once."""
        self._released: deque[tuple[int, array[int]]] = deque()
        """Such arrays of groups of which a member has connected since."""
        self._allowance = 0.0
        self._allowance_at = self._started_at = core.clock.monotonic()
        self.planned = trio.Event()
        """Set when a check is planned; a timer that waits for it puts a new one in its place."""

    # --- when ---------------------------------------------------------------------------------

    def schedule(self, slots: Iterable[int], due_ms: float) -> None:
        """Ask about transactions at a time, in ms since 1970, instead of when it was planned."""
        bucket = (max(int(due_ms), self._core.clock.epoch_ms()) >> BUCKET_SHIFT) + 1
        entries = self._wheel.get(bucket)
        if entries is None:
            entries = self._wheel[bucket] = array("I")
            heapq.heappush(self._buckets, bucket)
            self.planned.set()
        due = self._halves.due
        for slot in slots:
            due[slot] = bucket
            entries.append(slot)

    def begin(self, slots: Iterable[int], due_ms: float) -> None:
        """Plan the first check of new transactions; what waited in their slots before does so no longer."""
        if self._waiting or self._released:
            for slot in slots:
                if slot < len(self._waits):
                    self._waits[slot] = 0
        self.schedule(slots, due_ms)

    def restore(self, planned: Iterable[tuple[Sequence[int], int]]) -> None:
        """Plan the checks of what was undecided before a restart: (slots, when in ms since 1970) each."""
        latest_ms = self._core.clock.epoch_ms() + int(CHECK_AFTER_SECONDS_MAX * 1000)
        for slots, due_ms in planned:
            # No wait is longer: the clock was ahead when this was planned.
            self.schedule(slots, due_ms if due_ms <= latest_ms else 0)
            for slot in slots if len(slots) == 1 else ():
                if self._halves.state[slot] == State.PARKED:
                    self._wait_for_member(slot)

    def next_ms(self, slot: int) -> int | None:
        """Return when a transaction is to be asked about, None when it waits for somebody to ask."""
        return self._halves.due[slot] << BUCKET_SHIFT or None

    def _take_due(self, count: int) -> list[int]:
        """Return up to so many slots that are due now, the longest due first."""
        halves, now = self._halves, self._core.clock.epoch_ms() >> BUCKET_SHIFT
        taken: list[int] = []
        looked_at = 0
        while self._released and len(taken) < count and looked_at < LOOKED_AT_MAX:
            group, slots = self._released[0]
            slot = slots.pop()
            looked_at += 1
            if self._waits[slot] == group + 1:
                self._waits[slot] = 0
                if halves.group[slot] == group and halves.state[slot] in OPEN:
                    halves.due[slot] = 0
                    taken.append(slot)
            if not slots:
                self._released.popleft()
        while self._buckets and self._buckets[0] <= now and len(taken) < count and looked_at < LOOKED_AT_MAX:
            bucket = self._buckets[0]
            entries, position = self._wheel[bucket], self._positions.get(bucket, 0)
            while position < len(entries) and len(taken) < count and looked_at < LOOKED_AT_MAX:
                slot = entries[position]
                position += 1
                looked_at += 1
                if halves.due[slot] == bucket and halves.state[slot] in OPEN:
                    halves.due[slot] = 0
                    taken.append(slot)
            self._positions[bucket] = position
            if position == len(entries):
                heapq.heappop(self._buckets)
                del self._wheel[bucket], self._positions[bucket]
        return taken

    def _back_off(self, slot: int) -> None:
        wait_s = min(self._core.settings.check_after * 2.0 ** self._halves.asks[slot], CHECK_INTERVAL_SECONDS_MAX)
        if self._halves.state[slot] == State.PARKED:
            wait_s = PARKED_CHECK_SECONDS
        self.schedule([slot], self._core.clock.epoch_ms() + wait_s * (1 + JITTER_SHARE * random.random()) * 1000)

    # --- whom ---------------------------------------------------------------------------------

    def joined(self, peer: Peer) -> None:
        """Note that a client has connected: it may be asked what nobody could be asked about."""
        self._connected[peer.instance] = peer
        self._gone.pop(peer.instance, None)
        group = self._halves.known_group(peer.group)
        waiting = self._waiting.pop(group, None)
        if waiting:
            self._released.append((group, waiting))

    def left(self, peer: Peer) -> None:
        """Note that a client has gone; what it was asked about is asked again."""
        if self._connected.get(peer.instance) is not peer:
            return
        members = self._core.deliveries.group(peer.group).members
        other = next(
            (one for one in members if one.instance == peer.instance and one is not peer and one.is_there), None
        )
        if other is not None:  # it has found this broker under two addresses
            self._connected[peer.instance] = other
        else:
            del self._connected[peer.instance]
            if len(self._gone) >= GONE_INSTANCES_MAX:
                self._gone.clear()
            self._gone[peer.instance] = self._core.clock.monotonic()
        for handle, asked in list(self._asked.items()):
            if asked.peer is peer:
                self._no_answer(handle, asked, "gone")

    def _wait_for_member(self, slot: int) -> None:
        group, waits = self._halves.group[slot], self._waits
        if slot >= len(waits):
            waits.frombytes(bytes(waits.itemsize * (len(self._halves.state) - len(waits))))
        if waits[slot] != group + 1:
            waits[slot] = group + 1
            self._waiting.setdefault(group, array("I")).append(slot)

    def _preparer(self, slot: int) -> Peer | None:
        """Return the client that prepared a transaction while it is there."""
        peer = self._connected.get(self._halves.instance_id(slot))
        if peer is None or not peer.is_there or peer.group != self._halves.tally(slot).name:
            return None
        return peer

    def _others_from(self, slot: int) -> float:
        """Return from when on others than the preparer may be asked, monotonic seconds."""
        gone = self._gone.get(self._halves.instance_id(slot), self._started_at)
        return gone + self._core.settings.check_elsewhere_after

    def _other_member(self, slot: int, topics: frozenset[str]) -> Peer | None:
        """Return a member of the group that publishes all topics of a transaction."""
        group = self._core.deliveries.group(self._halves.tally(slot).name)
        fitting = [member for member in group.members if member.is_there and topics <= member.topics]
        return random.choice(fitting) if fitting else None

    # --- asking -------------------------------------------------------------------------------

    async def ask_due(self) -> None:
        """Ask about what is due, as far as the cap per second goes."""
        core, now = self._core, self._core.clock.monotonic()
        rate = core.settings.checks_per_second
        self._allowance = min(rate / 4 + 1, self._allowance + (now - self._allowance_at) * rate)
        self._allowance_at = now
        for handle, asked in list(self._asked.items()):
            if now >= asked.deadline:
                self._no_answer(handle, asked, "no answer")
        chosen, taken = list[int](), 0
        while taken < TAKEN_MAX and (due := self._take_due(int(self._allowance) - len(chosen))):
            taken += len(due)
            chosen += [slot for slot in due if self._may_ask(slot, now)]
        if chosen:
            self._allowance -= len(chosen)
            await self._ask(chosen)
            core.turn.end()

    def _may_ask(self, slot: int, now: float) -> bool:
        """Return whether somebody may be asked about a transaction now; if not, it waits."""
        if self._halves.handle[slot] in self._asked:
            return False
        if self._preparer(slot) is not None:
            return True
        others_from = self._others_from(slot)
        if now < others_from:
            self.schedule([slot], self._core.clock.epoch_ms() + (others_from - now) * 1000)
        elif any(member.is_there for member in self._core.deliveries.group(self._halves.tally(slot).name).members):
            return True
        self._wait_for_member(slot)
        return False

    async def _ask(self, slots: Sequence[int]) -> None:
        core, halves = self._core, self._halves
        handles = [halves.handle[slot] for slot in slots]
        if any(handle in halves.parts for handle in handles):
            await core.store.all_durable()  # messages are being added, whose rows may not be on the disk yet
        wanted = halves.rows_of(slots)
        asked_before = [handle for slot, handle in zip(slots, handles, strict=True) if halves.asks[slot]]

        def read() -> tuple[dict[int, Question], dict[int, CheckState]]:
            checks = {handle: read_checks(core.store.tables, handle) for handle in asked_before}
            return {handle: question_of(half) for handle, half in each_half(core.store.tables, wanted)}, checks

        found, states = await trio.to_thread.run_sync(read)
        questions: dict[Peer, list[tuple[int, bytes, bytes]]] = {}
        sizes: Counter[Peer] = Counter()
        for slot, handle in zip(slots, handles, strict=True):
            if halves.state[slot] not in OPEN or halves.handle[slot] != handle:
                continue  # it was decided meanwhile
            first, topics = found.get(handle, NO_QUESTION)
            if first is None:
                log.error("a half message cannot be read, so nobody can be asked about it", handle=handle)
                self.schedule([slot], core.clock.epoch_ms() + UNREADABLE_RETRY_SECONDS * 1000)
                continue
            peer = self._preparer(slot)
            if peer is None and core.clock.monotonic() >= self._others_from(slot):
                peer = self._other_member(slot, topics)
            if peer is None:
                self._wait_for_member(slot)
                continue
            waiting_bytes = peer.outbox_bytes + sizes[peer]
            if waiting_bytes and waiting_bytes + len(first) > ASK_OUTBOX_BYTES_MAX:
                self.schedule([slot], core.clock.epoch_ms() + LATER_SECONDS * 1000)
                continue
            sizes[peer] += len(first)
            self._note_asked(slot, handle, peer, states.get(handle, NEVER_ASKED))
            questions.setdefault(peer, []).append((halves.asks[slot], first[:16] + COUNTER_KEY.pack(handle), first))
        for peer, asked in questions.items():
            send_questions(peer, asked)

    def _note_asked(self, slot: int, handle: int, peer: Peer, before: CheckState) -> None:
        core = self._core
        self._halves.asks[slot] = min(self._halves.asks[slot] + 1, 255)
        core.counters["checks_asked"] += 1
        deadline = core.clock.monotonic() + CHECK_ANSWER_SECONDS
        self._asked[handle] = _Asked(slot, peer, core.clock.epoch_ms(), deadline, before)

    # --- answers ------------------------------------------------------------------------------

    def answered(self, peer: Peer, answer: int, tokens: Sequence[bytes]) -> None:
        """Take answers that decide nothing; only members of the owning group are listened to."""
        halves, unknown = self._halves, answer == DECISION_UNKNOWN
        for token in tokens:
            slot = halves.find(token[:16])
            if slot is None or halves.state[slot] not in OPEN or halves.tally(slot).name != peer.group:
                continue
            asked = self._asked.pop(halves.handle[slot], None)
            if asked is None:
                continue  # nobody asked
            self._core.counters["checks_unknown" if unknown else "checks_running"] += 1
            if unknown:
                halves.unknowns[slot] = min(halves.unknowns[slot] + 1, 255)
                if halves.unknowns[slot] >= self._core.settings.check_limit and halves.state[slot] == State.OPEN:
                    self._park(slot, token[:16])
            self._note_answer(slot, asked, peer.name, "unknown" if unknown else "running")

    def _park(self, slot: int, transaction_id: bytes) -> None:
        self._halves.park(slot)
        self._core.counters["parked"] += 1
        log.warning(
            "a transaction is parked: its producers do not know what became of it; see kiteq tx show",
            transaction=transaction_id.hex(),
            group=self._halves.tally(slot).name,
        )

    def _no_answer(self, handle: int, asked: _Asked, why: str) -> None:
        del self._asked[handle]
        if self._halves.state[asked.slot] in OPEN and self._halves.handle[asked.slot] == handle:
            self._core.counters["checks_unanswered"] += 1
            self._note_answer(asked.slot, asked, asked.peer.name, why)

    def _note_answer(self, slot: int, asked: _Asked, client: str, answer: str) -> None:
        """Write what was answered, and plan the next check."""
        halves, now_ms = self._halves, self._core.clock.epoch_ms()
        self._back_off(slot)
        if halves.state[slot] == State.PARKED:
            self._wait_for_member(slot)
        submission = Submission(urgent=False)
        submission.rows.append(self._row(slot, asked.before, [asked.at_ms, client, answer, now_ms]))
        self._core.store.writer.submit(submission)

    def _row(self, slot: int, before: CheckState, *answers: list[object]) -> Row:
        halves, history = self._halves, [*before.history, *answers][-CHECK_HISTORY_MAX:]
        is_parked = halves.state[slot] == State.PARKED
        parked_ms = (before.parked_ms or self._core.clock.epoch_ms()) if is_parked else 0
        next_ms = halves.due[slot] << BUCKET_SHIFT
        state = CheckState(halves.asks[slot], halves.unknowns[slot], next_ms, parked_ms, history)
        return (Table.CHECKS, COUNTER_KEY.pack(halves.handle[slot]), pack_checks(state))

    def decided(self, slots: Sequence[int], client: str, answer: str, now_ms: int) -> list[Row]:
        """Note decisions about transactions; return the rows that keep the answers they were to checks."""
        rows: list[Row] = []
        for slot in slots if self._asked else ():
            asked = self._asked.pop(self._halves.handle[slot], None)
            if asked is not None:
                self._core.counters[f"checks_{answer}"] += 1
                rows.append(self._row(slot, asked.before, [asked.at_ms, client, answer, now_ms]))
        return rows

    # --- by hand ------------------------------------------------------------------------------

    def resume(self, slot: int) -> Row:
        """Let the checks of a transaction begin again, now; return its row of checks, to be submitted."""
        self._halves.unpark(slot)
        self._asked.pop(self._halves.handle[slot], None)
        self.schedule([slot], self._core.clock.epoch_ms())
        return self._row(slot, read_checks(self._core.store.tables, self._halves.handle[slot]))
