"""Answers producers, once what they sent is durable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kiteq.pipe.events import Accepted, NotStored, Stored
from kiteq.remoting.packets import RECEIPT_DUPLICATE, Receipts, Refusal

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.events import Frame
    from kiteq.pipe.peer import Peer

__all__ = ["Respond"]


class Respond:
    """One `Receipts` for each publish frame; a `Refusal` when the store had no room."""

    accepts = (Accepted, Stored, NotStored)
    emits = (Stored,)

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: Accepted | Stored | NotStored) -> tuple[Stored, ...]:
        """Queue the answers; what was stored goes on to be delivered."""
        batch = event.batch
        if batch.done is not None:
            batch.done(event.error if type(event) is NotStored else None)
            return (event,) if type(event) is Stored else ()
        assert batch.peer is not None
        if type(event) is NotStored:
            for frame in batch.frames:
                self._core.counters["refused"] += frame.total
                batch.peer.send(Refusal(frame.request, "store_full", str(event.error), True))
            return ()
        if type(event) is Accepted:
            self._answer(batch.peer, batch.frames, durable=False)
            return ()
        assert type(event) is Stored
        if not event.durable or self._core.settings.flush == "sync":
            self._answer(batch.peer, batch.frames, durable=event.durable and self._core.store.durable)
        return (event,)

    def _answer(self, peer: Peer, frames: list[Frame], *, durable: bool) -> None:
        accepted = 0
        for frame in frames:
            accepted += len(frame.ids)
            if len(frame.routed) == 1 and not frame.exceptions and not frame.repeated:
                _, groups, fly = frame.routed[0]
                peer.send(Receipts(frame.request, groups, durable and not fly, []))
            else:
                self._answer_mixed(peer, frame, durable=durable)
        self._core.counters["accepted"] += accepted

    def _answer_mixed(self, peer: Peer, frame: Frame, *, durable: bool) -> None:
        """Answer a frame of several kinds, or with messages that were refused or there before."""
        exceptions: list[list[Any]] = list(frame.exceptions)
        for index, message_id in frame.repeated:
            if self._core.duplicates.body_crc(peer.group, message_id) is None:
                exceptions.append([index, "store_full", "the first send of this message was not stored", True])
            else:
                self._core.counters["duplicates"] += 1
                exceptions.append([index, RECEIPT_DUPLICATE, "", False])
        exceptions.sort(key=lambda exception: int(exception[0]))
        left_out = {exception[0] for exception in exceptions}
        counts = iter([groups for messages, groups, _ in frame.routed for _ in range(messages)])
        groups = [0 if index in left_out else next(counts, 0) for index in range(frame.total)]
        all_durable = durable and not any(fly for _, _, fly in frame.routed)
        peer.send(Receipts(frame.request, groups, all_durable, exceptions))
