"""Answers pings, and sorts what else a connection sent by what it is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kiteq.pipe.events import (
    AdminAsked,
    BindingsSent,
    CreditGranted,
    Deciding,
    Departed,
    HalvesSent,
    Published,
    Settling,
    Trusted,
)
from kiteq.remoting.packets import (
    Ack,
    Admin,
    Credit,
    Decide,
    Enlist,
    Extend,
    Goodbye,
    Nack,
    Ping,
    Pong,
    Prepare,
    Publish,
    Subscribe,
    Unsubscribe,
)

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["Heartbeat"]


class Heartbeat:
    """A ping is answered at once; a packet only a broker may send ends the connection."""

    accepts = (Trusted,)
    emits = (Published, HalvesSent, Deciding, Settling, CreditGranted, BindingsSent, AdminAsked, Departed)

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: Trusted) -> list[Any]:
        """Return one event for each subject: messages first, then settlements, then the rare ones."""
        peer = event.peer
        published: list[Publish] = []
        halves: list[Prepare | Enlist] = []
        decisions: list[Decide] = []
        settling = Settling(peer, [], [], [])
        rest: list[Any] = []
        for packet in event.packets:
            kind = type(packet)
            if kind is Publish:
                published.append(packet)  # type: ignore[arg-type]
            elif kind is Prepare or kind is Enlist:
                halves.append(packet)  # type: ignore[arg-type]
            elif kind is Decide:
                decisions.append(packet)  # type: ignore[arg-type]
            elif kind is Ack:
                settling.acks.append(packet)  # type: ignore[arg-type]
            elif kind is Nack:
                settling.nacks.append(packet)  # type: ignore[arg-type]
            elif kind is Extend:
                settling.extensions.append(packet)  # type: ignore[arg-type]
            elif kind is Ping:
                peer.send(Pong(packet.request))
            elif kind is Credit:
                rest.append(CreditGranted(peer, packet))  # type: ignore[arg-type]
            elif kind in (Subscribe, Unsubscribe):
                rest.append(BindingsSent(peer, packet))  # type: ignore[arg-type]
            elif kind is Admin:
                rest.append(AdminAsked(peer, packet))  # type: ignore[arg-type]
            elif kind is Goodbye:
                rest.append(Departed(peer, packet))  # type: ignore[arg-type]
            elif kind is not Pong:
                peer.refuse("bad_frame", f"a client does not send a {kind.__name__}")
        events: list[Any] = [Published(peer, published)] if published else []
        if halves:
            events.append(HalvesSent(peer, halves))
        if decisions:
            events.append(Deciding(peer, decisions))
        if settling.acks or settling.nacks or settling.extensions:
            events.append(settling)
        return events + rest
