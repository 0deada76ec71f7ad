"""Tells what may be accepted from what may not: checksum, head, topic, limits, duplicates.

The hot path takes a frame whose messages are all of one kind, known from before, undamaged and new:
two calls a message. Everything else goes message by message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

from kiteq.errors import Refused
from kiteq.message import CRC_RESIDUE, HEAD_OFFSET, BadMessage, parse_extras, parse_head, split
from kiteq.pipe.delays import check_due, due_of, save_delayed
from kiteq.pipe.events import Admitted, Batch, Checked, Frame, Kind
from kiteq.remoting.packets import RECEIPT_DELAYED

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.remoting.packets import Publish

__all__ = ["Check"]


class Check:
    """Each message is accepted or refused on its own; a bad one does not harm its neighbours."""

    accepts = (Admitted,)
    emits = (Checked,)

    def __init__(self, core: Core) -> None:
        self._core = core
        self._kind: Kind | None = None
        """The kind seen last: the next frame is usually of the same."""
        self.now_ms = 0
        self._by_due: dict[int, list[bytes]] = {}
        """Messages of the batch that wait for their time, by when they are due."""

    def handle(self, event: Admitted) -> tuple[Checked, ...]:
        """Check all frames of a batch."""
        core, group = self._core, event.peer.group
        if core.duplicates.is_full:
            core.duplicates.rotate(core.clock.monotonic(), core.store.last_commit)
        self.now_ms = core.clock.epoch_ms()
        frames = [self._frame(packet, group) for packet in event.packets]
        size = sum([len(blob) for frame in frames for _, blobs in frame.runs for blob in blobs])
        batch = Batch(event.peer, frames, size)
        if self._by_due:
            batch.delayed = save_delayed(core, group, self._by_due, self.now_ms)
            batch.size += batch.delayed.size
            self._by_due = {}
        return (Checked(batch),)

    def _frame(self, packet: Publish, group: str) -> Frame:
        blobs = packet.messages
        frame = Frame(packet.request, len(blobs))
        kind = self.uniform(blobs)
        duplicates = self._core.duplicates
        if kind is not None:
            ids = [blob[:16] for blob in blobs]
            if not duplicates.known(group, ids):
                frame.ids, frame.crcs = ids, [blob[16:20] for blob in blobs]
                frame.runs = [(kind, blobs)]
                duplicates.add(group, ids, frame.crcs)
                return frame
        for index, blob in enumerate(blobs):
            self._single(frame, index, blob, group)
        return frame

    def uniform(self, blobs: list[bytes]) -> Kind | None:
        """Return the kind of all messages of a frame when they are of one, known and undamaged."""
        first = blobs[0]
        kind = self._kind
        if kind is None or not first.startswith(kind.prefix, HEAD_OFFSET):
            kind = self._core.router.kind(_prefix(first))
            if kind is None:
                return None
            self._kind = kind
        prefix = kind.prefix
        for blob in blobs:
            if crc32(blob) != CRC_RESIDUE or not blob.startswith(prefix, HEAD_OFFSET):
                return None
        most = max(map(len, blobs)) - len(prefix) - HEAD_OFFSET - 4
        if most > self._core.settings.message_limit or not self._known(kind):
            return None
        return None if kind.head.topic in self._core.full_topics else kind

    def _known(self, kind: Kind) -> bool:
        """Return whether a kind is still in the router's cache: topics and limits were checked there."""
        return self._core.router.kind(kind.prefix) is kind

    def _single(self, frame: Frame, index: int, blob: bytes, group: str) -> None:
        try:
            kind, due_ms = self.kind_of(blob)
        except BadMessage as bad:
            self._refuse(frame, index, Refused(bad.code, bad.reason))
            return
        except Refused as refused:
            self._refuse(frame, index, refused)
            return
        duplicates = self._core.duplicates
        message_id, crc = blob[:16], blob[16:20]
        known = duplicates.body_crc(group, message_id)
        if known is None:
            duplicates.add(group, [message_id], [crc])
            frame.ids.append(message_id)
            frame.crcs.append(crc)
            if due_ms is not None:
                self._by_due.setdefault(due_ms, []).append(blob)
                frame.exceptions.append([index, RECEIPT_DELAYED, "", False])
            elif frame.runs and frame.runs[-1][0] is kind:
                frame.runs[-1][1].append(blob)
            else:
                frame.runs.append((kind, [blob]))
        elif known == crc:
            frame.repeated.append((index, message_id))
        else:
            reason = f"message id {message_id.hex()} was used in the last minutes with another body"
            self._refuse(frame, index, Refused("id_reused", reason))

    def _refuse(self, frame: Frame, index: int, refused: Refused) -> None:
        self._core.counters["refused"] += 1
        frame.exceptions.append([index, refused.code, refused.reason, refused.temporary])

    def kind_of(self, blob: bytes) -> tuple[Kind, int | None]:
        """Return the kind of one message, and when it is due if it has to wait. Raises `BadMessage` or `Refused`."""
        if crc32(blob) != CRC_RESIDUE:
            raise BadMessage("bad_checksum", "the checksum of the message does not match its bytes")
        head_bytes, extras_bytes, body_at = split(blob)
        body_size = len(blob) - 4 - body_at
        limit = self._core.settings.message_limit
        if body_size > limit:
            raise Refused("message_too_large", f"a body of {body_size} bytes is over this broker's limit of {limit}")
        due_ms = due_of(parse_extras(extras_bytes), self.now_ms)
        if due_ms is not None:
            check_due(due_ms, self.now_ms)
        prefix = len(head_bytes).to_bytes(2, "big") + head_bytes + b"\0\0"
        router = self._core.router
        kind = router.kind(prefix) or router.new_kind(prefix, parse_head(head_bytes))
        if due_ms is not None and kind.is_fly:
            raise Refused("fly_not_allowed", "a fly message is not stored, so it cannot wait for its time")
        topic = kind.head.topic
        full = self._core.full_topics.get(topic)
        if full is not None:
            raise Refused("group_quota", f"group {full!r} keeps too much of topic {topic!r}", temporary=True)
        return kind, due_ms


def _prefix(blob: bytes) -> bytes:
    """Return length and bytes of the head, and an empty extras' length, of what may be a message."""
    end = HEAD_OFFSET + 2 + int.from_bytes(blob[HEAD_OFFSET : HEAD_OFFSET + 2], "big")
    return blob[HEAD_OFFSET : end + 2]
