"""Stores half messages, and decides what becomes of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from kiteq.pipe.events import Checked, Deciding, HalvesChecked
from kiteq.remoting.packets import DECISION_COMMIT, DECISION_RUNNING, DECISION_UNKNOWN, Decide, Decided

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.peer import Peer

__all__ = ["Transact"]


class Transact:
    """A half message is stored and goes no further; one that is committed goes on as a plain one would."""

    accepts = (HalvesChecked, Deciding)
    emits = ()

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: HalvesChecked | Deciding) -> tuple[Checked, ...]:
        """Start what the answers wait for; committed messages come back through `Core.place`."""
        core, peer = self._core, event.peer
        if type(event) is HalvesChecked:
            core.preparing.prepare(peer, event.frames)
            return ()
        assert type(event) is Deciding
        for packet in event.packets:
            if packet.decision in (DECISION_UNKNOWN, DECISION_RUNNING) or not packet.tokens:
                core.checks.answered(peer, packet.decision, packet.tokens)
                peer.send(Decided(packet.request, []))
            else:
                self._decide(peer, packet)
        return ()

    def _decide(self, peer: Peer, packet: Decide) -> None:
        answer = partial(_answer, peer, packet.request)
        commit = packet.decision == DECISION_COMMIT
        self._core.transactions.decide(packet.tokens, answer, commit=commit, group=peer.group, by=peer.name, peer=peer)


def _answer(peer: Peer, request: int, exceptions: list[list[object]]) -> None:
    exceptions.sort(key=lambda exception: exception[0])  # type: ignore[arg-type, return-value]
    peer.send(Decided(request, exceptions))
