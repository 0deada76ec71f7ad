"""Fixes the groups of each message, in the same turn that hands it to the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiteq.message import FLAG_FLY
from kiteq.pipe.events import Checked, Placed, Routed

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["Route"]


class Route:
    """Looks the outlets of each kind of message up; a kind's outlets are cached by the router."""

    accepts = (Checked,)
    emits = (Routed,)

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: Checked) -> tuple[Routed, ...]:
        """Return the batch with the outlets of every run of messages."""
        router = self._core.router
        accepted_ms = self._core.clock.epoch_ms()
        placed: list[Placed] = []
        for frame in event.batch.frames:
            for kind, blobs in frame.runs:
                outlets = router.route(kind)
                head = kind.head
                placed.append(Placed(kind, outlets, blobs, accepted_ms + head.ttl_ms, fly=head.flags & FLAG_FLY != 0))
        return (Routed(event.batch, placed, accepted_ms),)
