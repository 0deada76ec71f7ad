"""Tells clients of the other brokers of a set of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kiteq.remoting.packets import Brokers

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.peer import Peer

__all__ = ["set_neighbours", "tell_neighbours"]

BROKERS_SINCE: Final = 2
"""The first wire version that has the packet."""


def tell_neighbours(core: Core, peer: Peer) -> None:
    """Tell a client that was just welcomed, if it can be told and there is something to tell."""
    if core.neighbours and peer.version >= BROKERS_SINCE:
        peer.send(Brokers(0, list(core.neighbours)))


def set_neighbours(core: Core, addresses: Sequence[str]) -> None:
    """Take the addresses of the set, this broker's own among them, and tell every client when they have changed."""
    if core.neighbours == tuple(addresses):
        return
    core.neighbours = tuple(addresses)
    for peer in core.peers:
        if peer.is_there:
            tell_neighbours(core, peer)
    core.turn.end()
