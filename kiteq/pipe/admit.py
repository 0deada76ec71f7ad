"""Flow control: refuses messages, with the reason, while the broker cannot take any."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiteq.pipe.events import Admitted, HalvesAdmitted, HalvesSent, Published
from kiteq.remoting.packets import Refusal

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["Admit"]


class Admit:
    """A full store, a full disk or a shutdown refuses all messages; settling them and decisions go on."""

    accepts = (Published, HalvesSent)
    emits = (Admitted, HalvesAdmitted)

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: Published | HalvesSent) -> tuple[Admitted | HalvesAdmitted, ...]:
        """Pass the messages on, or refuse each frame of them."""
        core = self._core
        refusing = ("draining", "this broker is shutting down") if core.draining else core.refusing
        if refusing is None:
            if type(event) is HalvesSent:
                return (HalvesAdmitted(event.peer, event.packets),)
            assert type(event) is Published
            return (Admitted(event.peer, event.packets),)
        for packet in event.packets:
            core.counters["refused"] += len(packet.messages)
            event.peer.send(Refusal(packet.request, *refusing, True))
        return ()
