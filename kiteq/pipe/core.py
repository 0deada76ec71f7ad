"""What all handlers share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from kiteq.pipe.checks import Checks
from kiteq.pipe.delays import Delays
from kiteq.pipe.preparing import Preparing
from kiteq.pipe.transactions import Transactions

if TYPE_CHECKING:
    from kiteq.clock import Clock
    from kiteq.config import Settings
    from kiteq.pipe.deliveries import Deliveries
    from kiteq.pipe.duplicates import DuplicateWindow
    from kiteq.pipe.events import Batch, NotStored, Stored
    from kiteq.pipe.peer import Peer
    from kiteq.pipe.registration import Registration
    from kiteq.pipe.router import Router
    from kiteq.pipe.turn import Turn
    from kiteq.registry.registry import Registry
    from kiteq.store.store import Store

__all__ = ["Core"]

READING_BYTES: Final = 256 * 1024
"""What a request that reads the disk counts among the uncommitted bytes of its client: few run at a time."""


@dataclass(slots=True)
class Core:
    """The broker's parts, for handlers.

    refusing: why publishing is refused now, as (code, reason), None while it is not.
    """

    settings: Settings
    clock: Clock
    store: Store
    router: Router
    deliveries: Deliveries
    duplicates: DuplicateWindow
    turn: Turn
    counters: Counter[str]
    started_at: float
    peers: set[Peer] = field(default_factory=set)
    refusing: tuple[str, str] | None = None
    resume: Callable[[Stored | NotStored], None] = lambda _event: None
    """Runs the event of a finished commit through the handlers behind `persist`."""
    place: Callable[[Batch], None] = lambda _batch: None
    """Runs messages that become deliverable now through the handlers behind `check`."""
    full_topics: dict[str, str] = field(default_factory=dict)
    """Topics refused because a group, named here, is over its quota."""
    near_quota: set[str] = field(default_factory=set)
    """Groups that keep so much that it was warned about."""
    filling_up: bool = False
    """Whether the store uses more than the share of its limit that is warned about."""
    draining: bool = False
    stop_wanted: trio.Event = field(default_factory=trio.Event)
    """Set when somebody asks the broker to drain and end, as a signal does."""
    registry: Registry | None = None
    """Where brokers find each other; None while this one is alone."""
    registration: Registration | None = None
    """Shares bindings through the registry."""
    neighbours: tuple[str, ...] = ()
    """Addresses of every broker of its set, as clients are told; empty while it is none of several workers."""
    unrouted_bytes: int = 0
    """Bytes of the messages that are kept because no group was bound to them."""
    taking_over: dict[tuple[str, str], trio.Event] = field(default_factory=dict)
    """Ends of the take-overs of kept messages that are under way, by (group, topic)."""
    delays: Delays = field(init=False)
    checks: Checks = field(init=False)
    preparing: Preparing = field(init=False)
    transactions: Transactions = field(init=False)

    def __post_init__(self) -> None:
        """Make what needs only the parts."""
        self.delays = Delays(self.store.epoch)
        self.checks = Checks(self)
        self.preparing = Preparing(self)
        self.transactions = Transactions(self)

    def start_reading(self, peer: Peer | None, work: Callable[[], Awaitable[None]]) -> None:
        """Start what reads the disk for a client, None for an administrator; one with much of it is not read from.

        While the broker ends nothing is started: nobody is there to be answered.
        """
        if self.deliveries.nursery is None:
            return
        self.deliveries.nursery.start_soon(self._read, peer, work)
        if peer is not None:
            peer.uncommitted_bytes += READING_BYTES

    async def _read(self, peer: Peer | None, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        finally:
            if peer is not None:
                peer.uncommitted_bytes -= READING_BYTES
                self.turn.touch_peer(peer)  # its reader may wait for this
        self.turn.end()
