"""Flow control: refuses messages, with the reason, while the broker cannot take any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiteq.pipe.events import Admitted, Published
from kiteq.remoting.packets import Refusal

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["Admit"]


class Admit:
    """A full store, a full disk or a shutdown refuses all messages; settling them goes on."""

    accepts = (Published,)
    emits = (Admitted,)

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: Published) -> tuple[Admitted, ...]:
        """Pass the messages on, or refuse each frame of them."""
        core = self._core
        refusing = ("draining", "this broker is shutting down") if core.draining else core.refusing
        if refusing is None:
            return (Admitted(event.peer, event.packets),)
        for packet in event.packets:
            core.counters["refused"] += len(packet.messages)
            event.peer.send(Refusal(packet.request, *refusing, True))
        return ()
