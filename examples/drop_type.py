"""A pipeline handler of your own: with `--handlers examples.drop_type:DropType` debug messages go nowhere."""

from __future__ import annotations

from kiteq.pipe.core import Core
from kiteq.pipe.events import Routed


class DropType:
    accepts = (Routed,)
    emits = (Routed,)
    before = "persist"

    def __init__(self, core: Core) -> None:
        self.dropped = "debug"

    def handle(self, event: Routed) -> tuple[Routed]:
        event.placed = [placed for placed in event.placed if placed.kind.head.message_type != self.dropped]
        for frame in event.batch.frames:  # the receipt says the truth: no group, not durable
            for at, (kind, blobs) in enumerate(frame.runs):
                if kind.head.message_type == self.dropped:
                    frame.routed[at] = (len(blobs), 0, True)
        return (event,)
