"""An outlet, its peers and its messages without a broker around them."""

from __future__ import annotations

from kiteq.binding.bindings import fanout
from kiteq.pipe.groups import Group
from kiteq.pipe.leases import Chunk, Lease
from kiteq.pipe.outlet import Outlet
from kiteq.pipe.peer import Peer
from kiteq.store.state import Subscription, TopicLog

EXPIRES_MS = 1 << 45


def make_peer(window: int = 100) -> Peer:
    peer = Peer("127.0.0.1:1", local=True, now=0.0, touched=lambda _peer: None)
    peer.window = window
    return peer


def make_outlet(watermark: int | None = None) -> Outlet:
    bindings = (fanout("trade", watermark=watermark),)
    return Outlet(Subscription(7, "members", TopicLog(1, "trade"), bindings, 0), Group("members", 0.0))


def chunk_of(first: int, count: int, accepted_ms: int = 5) -> Chunk:
    blobs = [b"%06d" % number for number in range(first, first + count)]
    return Chunk(range(first, first + count), first, blobs, accepted_ms, EXPIRES_MS)


def lease_for(peer: Peer, outlet: Outlet, count: int) -> Lease:
    lease = Lease(peer, outlet, chunk_of(0, count), 60.0, 3_600.0)
    peer.hold(lease)
    return lease
