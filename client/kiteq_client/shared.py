"""What the connections of a client share, and what each needs of its broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kiteq.remoting.packets import Ask
from kiteq_client.deciding import Deciding
from kiteq_client.incoming import Incoming
from kiteq_client.outgoing import Frame, Outgoing
from kiteq_client.preparing import Preparing
from kiteq_client.statistics import Counters
from kiteq_client.unanswered import Unanswered

if TYPE_CHECKING:
    from kiteq_client.session import Session

__all__ = ["Owner", "Shared"]


class Shared(NamedTuple):
    """What all connections of a client have in common.

    held_tags: tags of a session that handlers or deliveries hold.
    """

    outgoing: Outgoing
    incoming: Incoming[Session]
    prefetch: int
    timeout: float
    held_tags: Callable[[Session], list[int]]
    counters: Counters


class Owner(Protocol):
    """The broker a session belongs to."""

    refused_at: float
    unanswered: Unanswered
    preparing: Preparing
    deciding: Deciding

    def next_request(self) -> int:
        """Return a request number."""

    def take(self, body_bytes_max: int) -> Frame | None:
        """Return what to send next, if it is this broker's turn."""

    def asked(self, packet: Ask) -> None:
        """Answer what the broker asks about transactions."""
