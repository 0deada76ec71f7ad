"""One client connection as the pipeline sees it: who it is, what it holds, what is to be sent to it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING

from kiteq.limits import IN_FLIGHT_BYTES_MAX
from kiteq.remoting.codec import encode_packet
from kiteq.remoting.packets import Goodbye, Packet, Refusal

if TYPE_CHECKING:
    from kiteq.pipe.leases import Lease

__all__ = ["Peer"]


class Peer:
    """State of one connection; no I/O.

    touched: called when the outbox stops being empty or the peer is to be closed.
    local: whether it connects from this machine over loopback.
    """

    __slots__ = (
        "_lease_tags", "_leases", "_touched", "accepted", "close_reason", "concurrency", "connected_at",
        "group", "in_flight", "in_flight_bytes", "instance", "leaving", "local", "name", "next_tag", "outbox",
        "outbox_bytes", "topics", "uncommitted_bytes", "version", "warm_up", "window",
    )  # fmt: skip

    def __init__(self, name: str, *, local: bool, now: float, touched: Callable[[Peer], None]) -> None:
        self.name = name
        self.local = local
        self.connected_at = now
        self._touched = touched
        self.accepted = False
        """Whether its Hello was answered by a Welcome."""
        self.version = 0
        """The wire version agreed on."""
        self.group = ""
        self.instance = b""
        """Which run of which program it is: the same on all its connections."""
        self.topics: frozenset[str] = frozenset()
        """What it publishes; about transactions of other topics it is not asked."""
        self.concurrency = 1
        self.warm_up = 0
        self.window = 0
        self.in_flight = 0
        self.in_flight_bytes = 0
        self.next_tag = 1
        self._leases: dict[int, Lease] = {}
        self._lease_tags: list[int] = []
        self.outbox: list[bytes] = []
        self.outbox_bytes = 0
        self.uncommitted_bytes = 0
        self.leaving = False
        """It said goodbye, or this broker did: it gets no more messages."""
        self.close_reason: str | None = None

    def send(self, packet: Packet) -> None:
        """Queue a packet; the end of the turn sends all that is queued at once."""
        frame = encode_packet(packet)
        if not self.outbox:
            self._touched(self)
        self.outbox.append(frame)
        self.outbox_bytes += len(frame)

    def refuse(self, code: str, reason: str) -> None:
        """Tell the peer why the connection ends, and end it once that is sent."""
        if self.close_reason is None:
            self.send(Refusal(0, code, reason, False))
            self.close(f"{code}: {reason}")

    def close(self, reason: str) -> None:
        """End the connection once what is queued was sent."""
        if self.close_reason is None:
            self.close_reason = reason
            self._touched(self)

    def say_goodbye(self, reason: str) -> None:
        """Ask the client to go elsewhere; what it holds may still be settled."""
        if not self.leaving:
            self.leaving = True
            self.send(Goodbye(0, reason))

    @property
    def is_there(self) -> bool:
        """Whether it can be asked something."""
        return self.accepted and not self.leaving and self.close_reason is None

    def free_credit(self, now: float) -> int:
        """Return how many more messages it may hold: its window, scaled while it warms up."""
        if self.leaving or self.close_reason is not None or self.in_flight_bytes >= IN_FLIGHT_BYTES_MAX:
            return 0
        window = self.window
        if self.warm_up:
            share = (now - self.connected_at) / self.warm_up
            if share < 1 and window:
                window = max(1, int(window * share))
            elif share >= 1:
                self.warm_up = 0
        return window - self.in_flight

    # --- what it holds ------------------------------------------------------------------------

    def hold(self, lease: Lease) -> None:
        """Note messages handed to it under the tags of a lease."""
        self._leases[lease.first_tag] = lease
        self._lease_tags.append(lease.first_tag)
        self.next_tag = lease.first_tag + len(lease.blobs)
        self.in_flight += lease.open
        self.in_flight_bytes += lease.size

    def release(self, lease: Lease) -> None:
        """Forget a lease in which nothing is open any more."""
        del self._leases[lease.first_tag]
        if self._lease_tags[0] == lease.first_tag:
            del self._lease_tags[0]
        else:
            del self._lease_tags[bisect_right(self._lease_tags, lease.first_tag) - 1]
        self.in_flight_bytes -= lease.size

    def lease_of(self, tag: int) -> tuple[Lease | None, int]:
        """Return the lease a tag belongs to, and the first tag above it that could belong to another."""
        place = bisect_right(self._lease_tags, tag) - 1
        following = self._lease_tags[place + 1] if place + 1 < len(self._lease_tags) else 1 << 63
        if place < 0:
            return None, following
        lease = self._leases[self._lease_tags[place]]
        return (lease, following) if tag < lease.first_tag + len(lease.blobs) else (None, following)

    def leases(self) -> list[Lease]:
        """Return what it holds, oldest first."""
        return [self._leases[tag] for tag in self._lease_tags]
