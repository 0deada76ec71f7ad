"""Tells which half messages may be stored; of one transaction all or none."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from kiteq.errors import Refused
from kiteq.limits import CHECK_AFTER_SECONDS_MAX, CHECK_AFTER_SECONDS_MIN
from kiteq.message import BadMessage
from kiteq.pipe.check import Check
from kiteq.pipe.events import HalfFrame, HalvesAdmitted, HalvesChecked
from kiteq.remoting.packets import Enlist, Prepare, Refusal

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.peer import Peer

__all__ = ["CheckHalves"]


class CheckHalves:
    """Checks half messages as plain ones are, and that a transaction is whole and new."""

    accepts = (HalvesAdmitted,)
    emits = (HalvesChecked,)

    def __init__(self, core: Core) -> None:
        self._core = core
        self._check = Check(core)

    def handle(self, event: HalvesAdmitted) -> tuple[HalvesChecked, ...]:
        """Check all frames; one that makes no sense as a whole is refused here."""
        core, peer = self._core, event.peer
        if core.duplicates.is_full:
            core.duplicates.rotate(core.clock.monotonic(), core.store.last_commit)
        self._check.now_ms = core.clock.epoch_ms()
        frames: list[HalfFrame] = []
        for packet in event.packets:
            try:
                frames.append(self._prepare(packet, peer) if type(packet) is Prepare else self._enlist(packet, peer))  # type: ignore[arg-type]
            except Refused as refused:
                core.counters["refused"] += len(packet.messages)
                peer.send(Refusal(packet.request, refused.code, refused.reason, refused.temporary))
        return (HalvesChecked(peer, frames),) if frames else ()

    def _prepare(self, packet: Prepare, peer: Peer) -> HalfFrame:
        blobs = packet.messages
        sizes = _sizes(packet)
        check_s = packet.check_after_ms / 1000
        if check_s and not CHECK_AFTER_SECONDS_MIN <= check_s <= CHECK_AFTER_SECONDS_MAX:
            raise Refused(
                "bad_limit", f"check_after must be {CHECK_AFTER_SECONDS_MIN:g} to {CHECK_AFTER_SECONDS_MAX:g} seconds"
            )
        frame = HalfFrame(packet.request, len(sizes), packet.check_after_ms, None)
        if len(sizes) == len(blobs) and self._take_all(frame, blobs, peer.group):
            return frame
        for index, (start, end) in enumerate(pairwise((0, *accumulate(sizes)))):
            self._transaction(frame, index, blobs[start:end], peer.group)
        return frame

    def _enlist(self, packet: Enlist, peer: Peer) -> HalfFrame:
        frame = HalfFrame(packet.request, 1, 0, packet.token)
        self._transaction(frame, 0, packet.messages, peer.group)
        return frame

    def _take_all(self, frame: HalfFrame, blobs: list[bytes], group: str) -> bool:
        """Take transactions of one message each when all are of one kind, undamaged and new."""
        kind = self._check.uniform(blobs)
        if kind is None or kind.is_fly:
            return False
        ids = [blob[:16] for blob in blobs]
        duplicates, halves = self._core.duplicates, self._core.store.halves
        if duplicates.known(group, ids) or halves.knows_any(ids):
            return False
        frame.ids = frame.message_ids = ids
        frame.crcs = [blob[16:20] for blob in blobs]
        frame.places = list(range(len(ids)))
        frame.sizes = [1] * len(ids)
        frame.blobs = blobs
        duplicates.add(group, ids, frame.crcs)
        return True

    def _transaction(self, frame: HalfFrame, index: int, blobs: list[bytes], group: str) -> None:
        try:
            repeated = self._check_messages(blobs, group, whole=frame.token is None)
        except BadMessage as bad:
            self._refuse(frame, index, Refused(bad.code, bad.reason))
            return
        except Refused as refused:
            self._refuse(frame, index, refused)
            return
        ids = [blob[:16] for blob in blobs]
        if repeated:
            frame.repeated.append((index, ids[0]))
            return
        crcs = [blob[16:20] for blob in blobs]
        self._core.duplicates.add(group, ids, crcs)
        frame.ids.append(ids[0])
        frame.places.append(index)
        frame.sizes.append(len(blobs))
        frame.blobs += blobs
        frame.message_ids += ids
        frame.crcs += crcs

    def _check_messages(self, blobs: list[bytes], group: str, *, whole: bool) -> bool:
        """Check the messages of one transaction; return whether it was sent before.

        whole: they are all of it: then its first one tells whether it is open. Raises `BadMessage` or `Refused`.
        """
        duplicates = self._core.duplicates
        known = 0
        for blob in blobs:
            kind, _ = self._check.kind_of(blob)
            if kind.is_fly:
                raise Refused("fly_not_allowed", "a fly message is never stored, so it cannot wait for a decision")
            crc = duplicates.body_crc(group, blob[:16])
            if crc is not None and crc != blob[16:20]:
                raise Refused("id_reused", f"message id {blob[:16].hex()} was used with another body")
            known += crc is not None
        ids = {blob[:16] for blob in blobs}
        if len(ids) != len(blobs):
            raise Refused("id_reused", "two messages of one transaction have the same id")
        if known and known < len(blobs):
            raise Refused("id_reused", "some messages of the transaction were sent before, others not")
        halves = self._core.store.halves
        slot = halves.find(blobs[0][:16]) if whole else None
        if slot is not None and halves.tally(slot).name != group:
            raise Refused("id_reused", f"transaction {blobs[0][:16].hex()} of another group is open here")
        return known > 0 or slot is not None

    def _refuse(self, frame: HalfFrame, index: int, refused: Refused) -> None:
        self._core.counters["refused"] += 1
        frame.exceptions.append([index, refused.code, refused.reason, refused.temporary])


def _sizes(packet: Prepare) -> list[int]:
    """Return how many messages each transaction of a packet has. Raises `Refused`."""
    total, sizes = len(packet.messages), packet.sizes
    if type(sizes) is int:
        if sizes and total % sizes == 0:
            return [sizes] * (total // sizes)
    elif all(sizes) and sum(sizes) == total:  # type: ignore[arg-type]
        return sizes  # type: ignore[return-value]
    raise Refused("bad_argument", f"the sizes of the transactions do not add up to {total} messages")
