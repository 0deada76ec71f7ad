"""Gives messages that became deliverable to the outlets they were routed to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiteq.pipe.events import CreditGranted, Departed, Stored
from kiteq.pipe.leases import Chunk

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["Deliver"]


class Deliver:
    """New messages, new credit and departures change what an outlet can hand out at the end of the turn."""

    accepts = (Stored, CreditGranted, Departed)
    emits = ()

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: Stored | CreditGranted | Departed) -> tuple[()]:
        """Note what changed; the end of the turn dispatches."""
        core = self._core
        if isinstance(event, Stored):
            self._add(event)
        elif isinstance(event, CreditGranted):
            core.deliveries.credit(event.peer, event.packet.window)
        else:
            peer = event.peer
            peer.leaving = True
            if core.deliveries.leave(peer, goodbye=True):
                core.router.forget_routes()
        return ()

    def _add(self, event: Stored) -> None:
        outlets = self._core.turn.outlets
        for placed in event.placed:
            for outlet in placed.outlets:
                if placed.fly:
                    self._core.counters["fly_dropped"] += outlet.add_fly(placed.blobs)
                else:
                    sequences = range(placed.first, placed.first + len(placed.blobs))
                    outlet.add_new(Chunk(sequences, 0, placed.blobs, event.accepted_ms, placed.expires_ms))
                outlets[outlet] = None
