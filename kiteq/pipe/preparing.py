"""Stores half messages, and answers their producers when that is durable."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from kiteq.limits import TRANSACTION_ADDED_BYTES_MAX
from kiteq.pipe.events import HalfFrame
from kiteq.remoting.packets import Prepared, Refusal
from kiteq.store.half_reading import read_halves
from kiteq.store.halves import State
from kiteq.store.writer import Recent, Submission

if TYPE_CHECKING:
    from kiteq.errors import StoreError
    from kiteq.pipe.core import Core
    from kiteq.pipe.peer import Peer
    from kiteq.store.tables import Row

__all__ = ["Preparing"]

FIRST_REFUSED: Final = ("store_full", "what this repeats was not stored", True)


class Preparing:
    """Takes half messages into `store.halves`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._halves = core.store.halves

    def prepare(self, peer: Peer, frames: list[HalfFrame]) -> None:
        """Store half messages; their frames are answered when that is durable."""
        core = self._core
        slots: list[list[int]] = []
        parts: list[Row | None] = []
        submission = Submission(lambda error: self._prepared(peer, frames, slots, parts, size, error))
        submission.refusable = True
        submission.accepted_ms = now_ms = core.clock.epoch_ms()
        for frame in frames:
            part = self._enlist(frame, peer, now_ms) if frame.token is not None else None
            slots.append(self._take(frame, peer, now_ms, submission) if frame.token is None and frame.ids else [])
            parts.append(part)
            if part is not None:
                submission.rows.append(part)
            if frame.message_ids:
                submission.recent.append(Recent(peer.group, b"".join(frame.message_ids), b"".join(frame.crcs)))
            submission.messages += len(frame.blobs)
        submission.recent_floor = core.duplicates.floor_commit
        size = sum([len(blob) for frame in frames for blob in frame.blobs])
        peer.uncommitted_bytes += size
        core.store.writer.submit(submission)

    def _take(self, frame: HalfFrame, peer: Peer, now_ms: int, submission: Submission) -> list[int]:
        """Give new transactions of a frame their slots, as far as the group's quota goes."""
        quota = self._core.settings.half_quota
        room = quota - self._halves.tally_of(peer.group).open
        if room < len(frame.ids):
            self._cut(frame, max(room, 0), peer.group, quota)
            if not frame.ids:
                return []
        check_ms = frame.check_after_ms or int(self._core.settings.check_after * 1000)
        taken, row = self._halves.add(
            frame.ids, frame.sizes, frame.blobs,
            group=peer.group, instance=peer.instance, prepared_ms=now_ms, check_ms=check_ms,
        )  # fmt: skip
        submission.rows.append(row)
        return taken

    def _cut(self, frame: HalfFrame, room: int, group: str, quota: int) -> None:
        """Refuse the transactions of a frame for which a group has no room."""
        messages = sum(frame.sizes[:room])
        reason = f"group {group!r} has {quota} open transactions, as many as it may; decide some of them"
        for place in frame.places[room:]:
            frame.exceptions.append([place, "half_quota", reason, True])
        self._core.counters["refused"] += len(frame.blobs) - messages
        self._core.duplicates.forget(group, frame.message_ids[messages:])
        frame.blobs = frame.blobs[:messages]
        for column in (frame.ids, frame.places, frame.sizes):
            del column[room:]
        frame.message_ids = frame.message_ids[:messages]
        frame.crcs = frame.crcs[:messages]

    def _enlist(self, frame: HalfFrame, peer: Peer, now_ms: int) -> Row | None:
        """Add the messages of a frame to an open transaction; return their row."""
        token, halves = frame.token, self._halves
        assert token is not None
        slot = self._open_slot(peer, token[:16])
        fault = None
        if slot is None:
            fault = ("unknown_transaction", f"transaction {token[:16].hex()} is not open here")
        elif halves.state[slot] == State.DECIDING:
            fault = ("transaction_conflict", f"transaction {token[:16].hex()} is decided already")
        elif halves.added_bytes(slot) + sum(map(len, frame.blobs)) > TRANSACTION_ADDED_BYTES_MAX:
            fault = ("transaction_too_large", f"over {TRANSACTION_ADDED_BYTES_MAX} bytes were added to the transaction")
        if fault is not None:
            self._core.counters["refused"] += len(frame.blobs)
            self._core.duplicates.forget(peer.group, frame.message_ids)
            frame.exceptions.append([0, *fault, False])
            frame.message_ids, frame.repeated = [], []
            return None
        assert slot is not None
        return halves.enlist(slot, frame.blobs, now_ms) if frame.ids else None

    def _prepared(
        self,
        peer: Peer,
        frames: list[HalfFrame],
        slots: list[list[int]],
        parts: list[Row | None],
        size: int,
        error: StoreError | None,
    ) -> None:
        core, halves = self._core, self._halves
        peer.uncommitted_bytes -= size
        core.turn.touch_peer(peer)  # its reader may wait for this
        if error is not None:
            for frame, taken, part in zip(frames, slots, parts, strict=True):
                core.duplicates.forget(peer.group, frame.message_ids)
                if taken:
                    halves.forget(frame.ids, taken)
                slot = None if frame.token is None else halves.find(frame.token[:16])
                if part is not None and slot is not None:
                    halves.withdraw_part(slot, part, sum(map(len, frame.blobs)))
                core.counters["refused"] += frame.total
                peer.send(Refusal(frame.request, "store_full", str(error), True))
            return
        for frame, taken in zip(frames, slots, strict=True):
            if taken:
                core.counters["prepared"] += len(taken)
                halves.opened(taken)
                check_ms = frame.check_after_ms or int(core.settings.check_after * 1000)
                core.checks.begin(taken, core.clock.epoch_ms() + check_ms)
            if frame.token is None:
                self._answer(peer, frame, taken)
            elif frame.repeated:
                core.start_reading(peer, partial(self._compare, peer, frame))
            else:
                self._answer_enlist(peer, frame)

    def _answer(self, peer: Peer, frame: HalfFrame, slots: list[int]) -> None:
        halves = self._halves
        if not frame.exceptions and not frame.repeated and slots:
            peer.send(Prepared(frame.request, halves.handle[slots[0]], []))
            return
        handles = [0] * frame.total
        for place, slot in zip(frame.places, slots, strict=False):
            handles[place] = halves.handle[slot]
        for place, transaction_id in frame.repeated:
            slot_of = self._open_slot(peer, transaction_id)
            if slot_of is not None and halves.state[slot_of] != State.DECIDING:
                handles[place] = halves.handle[slot_of]
            elif self._was_refused(peer, transaction_id):
                frame.exceptions.append([place, *FIRST_REFUSED])
            else:
                reason = f"transaction {transaction_id.hex()} is decided, or its message was sent, already"
                frame.exceptions.append([place, "transaction_conflict", reason, False])
        frame.exceptions.sort(key=lambda exception: int(exception[0]))
        peer.send(Prepared(frame.request, handles[0] if frame.total == 1 else handles, frame.exceptions))

    async def _compare(self, peer: Peer, frame: HalfFrame) -> None:
        """Answer for messages to be added that were sent before: to this transaction, or otherwise."""
        assert frame.token is not None
        slot, message_id = self._open_slot(peer, frame.token[:16]), frame.repeated[0][1]
        if slot is not None:
            read = partial(read_halves, self._core.store.tables, self._halves.rows_of([slot]))
            found = await trio.to_thread.run_sync(read)
            if all(blob is None or blob[:16] != message_id for half in found.values() for blob in half.blobs):
                reason = f"message {message_id.hex()} was sent before, and not in this transaction"
                refused = self._was_refused(peer, message_id)
                frame.exceptions.append([0, *(FIRST_REFUSED if refused else ("id_reused", reason, False))])
        self._answer_enlist(peer, frame)

    def _answer_enlist(self, peer: Peer, frame: HalfFrame) -> None:
        assert frame.token is not None
        slot = self._open_slot(peer, frame.token[:16])
        if slot is None and not frame.exceptions:
            reason = f"transaction {frame.token[:16].hex()} is decided already"
            frame.exceptions.append([0, "transaction_conflict", reason, False])
        handle = 0 if slot is None or frame.exceptions else self._halves.handle[slot]
        peer.send(Prepared(frame.request, handle, frame.exceptions))

    def _open_slot(self, peer: Peer, transaction_id: bytes) -> int | None:
        """Return the slot of a transaction of the client's group that is durable and not decided yet."""
        halves = self._halves
        slot = halves.find(transaction_id)
        if slot is None or halves.tally(slot).name != peer.group or halves.state[slot] == State.PREPARING:
            return None
        return slot

    def _was_refused(self, peer: Peer, message_id: bytes) -> bool:
        """Return whether the message that one is a repetition of was not stored after all."""
        return self._core.duplicates.body_crc(peer.group, message_id) is None
