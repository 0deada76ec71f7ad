"""Changes the bindings of a client's group at its request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiteq.errors import Refused, StoreError
from kiteq.pipe.authenticate import parse_bindings
from kiteq.pipe.events import BindingsSent
from kiteq.pipe.registration import bind_shared, unbind_shared
from kiteq.remoting.packets import Refusal, Subscribe, Subscribed, Unsubscribe

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.peer import Peer

__all__ = ["Bind"]


class Bind:
    """Answers when the change is durable and in force."""

    accepts = (BindingsSent,)
    emits = ()

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: BindingsSent) -> tuple[()]:
        """Start the change."""
        peer, packet = event.peer, event.packet

        def done(error: StoreError | Refused | None) -> None:
            if error is None:
                peer.send(Subscribed(packet.request))
            elif isinstance(error, Refused):
                _refuse(peer, packet.request, error)
            else:
                peer.send(Refusal(packet.request, "store_full", str(error), True))

        if type(packet) is Subscribe:
            try:
                bindings = parse_bindings(packet.bindings)
            except Refused as refused:
                _refuse(peer, packet.request, refused)
            else:
                bind_shared(self._core, peer.group, bindings, done)
        elif type(packet) is Unsubscribe:
            # One that is not there is gone already, as asked.
            unbind_shared(self._core, peer.group, packet.topic, packet.kind, packet.pattern, done)
        return ()


def _refuse(peer: Peer, request: int, refused: Refused) -> None:
    peer.send(Refusal(request, refused.code, refused.reason, refused.temporary))
