"""Takes what consumers say of the messages they hold; the answer follows when it is durable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kiteq.pipe.events import Settling
from kiteq.remoting.packets import NACK_FAILED, NACK_REJECTED, Nack, Settled

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.leases import Lease
    from kiteq.pipe.peer import Peer

__all__ = ["Settle"]


class Settle:
    """Acks free credit at once; a tag that is not held any more is stale, and changes nothing."""

    accepts = (Settling,)
    emits = ()

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: Settling) -> tuple[()]:
        """Settle, fail, hand back or extend."""
        peer, turn = event.peer, self._core.turn
        for ack in event.acks:
            turn.answer_when_settled(peer, Settled(ack.request, self._ack(peer, ack.ranges)))
        for nack in event.nacks:
            turn.answer_when_settled(peer, Settled(nack.request, self._nack(peer, nack)))
        if event.extensions:
            now = self._core.clock.monotonic()
            for extension in event.extensions:
                self._extend(peer, extension.ranges, now + self._core.settings.ack_deadline)
        return ()

    def _ack(self, peer: Peer, ranges: list[int]) -> list[int]:
        stale: list[int] = []
        done = self._core.deliveries.settlement.done
        for first, last in zip(ranges[::2], ranges[1::2], strict=True):
            tag = first
            while tag <= last:
                lease, following = peer.lease_of(tag)
                upto = min(last + 1, following)
                if lease is None:
                    stale += [tag, upto - 1]
                    tag = upto
                    continue
                start = tag - lease.first_tag
                stop = min(upto - lease.first_tag, len(lease.blobs))
                runs = lease.take(start, stop)
                for run in runs:
                    done(lease, *run)
                stale += _missing(lease, start, stop, runs)
                if not lease.open:
                    peer.release(lease)
                tag = lease.first_tag + stop
        self._core.counters["stale"] += len(stale) // 2
        return stale

    def _nack(self, peer: Peer, nack: Nack) -> list[int]:
        stale: list[int] = []
        settlement = self._core.deliveries.settlement
        for tag, how, after_ms, error, *_ in reversed(nack.items):  # so that what is handed back keeps its order
            lease, _following = peer.lease_of(tag)
            index = 0 if lease is None else tag - lease.first_tag
            if lease is None or not lease.take(index, index + 1):
                stale += [tag, tag]
                continue
            if how == NACK_FAILED:
                settlement.failed(lease, index, error, after_ms)
            elif how == NACK_REJECTED:
                settlement.rejected(lease, index, error)
            else:
                settlement.hand_back(lease, index, index + 1)
            if not lease.open:
                peer.release(lease)
        self._core.counters["stale"] += len(stale) // 2
        return stale

    @staticmethod
    def _extend(peer: Peer, ranges: list[int], deadline: float) -> None:
        for first, last in zip(ranges[::2], ranges[1::2], strict=True):
            tag = first
            while tag <= last:
                lease, following = peer.lease_of(tag)
                if lease is not None:
                    lease.deadline = min(deadline, lease.hold_until)
                if following > last:
                    break
                tag = following


def _missing(lease: Lease, start: int, stop: int, runs: list[tuple[int, int]]) -> list[int]:
    """Return the tags of start..stop that were not among the runs taken, as flat ranges."""
    missing: list[int] = []
    for run_start, run_stop in [*runs, (stop, stop)]:
        if start < run_start:
            missing += [lease.first_tag + start, lease.first_tag + run_start - 1]
        start = run_stop
    return missing
