"""One turn of the loop: what its handlers leave to be done once at its end.

A turn is one socket read run through the pipeline, the callbacks of one commit, or one tick of the
timer. At its end settlements become one submission, outlets with something new hand it out, and each
connection with something queued gets one send.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.errors import StoreError
    from kiteq.pipe.outlet import Outlet
    from kiteq.pipe.peer import Peer
    from kiteq.remoting.packets import Packet
    from kiteq.store.store import Store

__all__ = ["Turn"]


class Turn:
    """What is still to be done.

    dispatch: hands out what an outlet has ready. flush: sends what a peer has queued.
    """

    def __init__(self, store: Store, flush: Callable[[Peer], None]) -> None:
        self._store = store
        self._flush = flush
        self.dispatch: Callable[[Outlet], None] = lambda _outlet: None
        self.peers: dict[Peer, None] = {}
        self.outlets: dict[Outlet, None] = {}
        self._settling: Submission | None = None
        self._answers: list[tuple[Peer, Packet]] = []

    def touch_peer(self, peer: Peer) -> None:
        """Note that a peer has something to send, or is to be closed."""
        self.peers[peer] = None

    def settling(self) -> Submission:
        """Return the submission that this turn's settlements go into."""
        if self._settling is None:
            self._settling = Submission(urgent=False)
        return self._settling

    def answer_when_settled(self, peer: Peer, packet: Packet) -> None:
        """Send a packet once this turn's settlements are durable."""
        self.settling()
        self._answers.append((peer, packet))

    def end(self) -> None:
        """Do what was left to the end."""
        while self.outlets:
            outlet = next(iter(self.outlets))
            del self.outlets[outlet]
            self.dispatch(outlet)
        self.submit()
        while self.peers:
            peer = next(iter(self.peers))
            del self.peers[peer]
            self._flush(peer)

    def submit(self) -> None:
        """Hand what was settled to the store; the cursors in memory must never be written ahead of it."""
        if self._settling is not None:
            submission, self._settling = self._settling, None
            answers, self._answers = self._answers, []

            def settled(error: StoreError | None) -> None:
                if error is None:
                    for peer, packet in answers:
                        peer.send(packet)

            submission.done = settled
            self._store.writer.submit(submission)
