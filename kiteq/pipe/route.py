"""Fixes the groups of each message, in the same turn that hands it to the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiteq.pipe.events import Checked, Placed, Routed

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["Route"]

JOINED_MESSAGES_MAX = 16
"""Frames this small travel on together when their messages are of one kind: at 5,000 single sends a
second all that follows is done once for seven of them."""


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
        last: Placed | None = None
        joined: list[bytes] | None = None
        for frame in event.batch.frames:
            for kind, blobs in frame.runs:
                outlets = router.route(kind)
                frame.routed.append((len(blobs), len(outlets), kind.is_fly))
                if last is not None and last.kind is kind and len(blobs) <= JOINED_MESSAGES_MAX:
                    if joined is None:
                        joined = last.blobs = list(last.blobs)
                    joined += blobs
                    continue
                last, joined = Placed(kind, outlets, blobs, accepted_ms + kind.head.ttl_ms), None
                placed.append(last)
        return (Routed(event.batch, placed, accepted_ms),)
