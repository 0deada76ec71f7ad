"""What a client tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Counters", "Statistics"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """A moment's figures of a client; the counters began when it was entered.

    connected: addresses of the brokers connected. not_reached: why, by address, for the others.
    in_flight: messages sent and not answered. sent: messages answered, refusals included.
    received: messages delivered to this client. acked, nacked: answers given. stale: answers that came
    too late to have an effect. reconnects: connections made after the first to each broker.
    """

    connected: tuple[str, ...]
    not_reached: Mapping[str, str]
    in_flight: int
    sent: int
    received: int
    acked: int
    nacked: int
    stale: int
    reconnects: int


class Counters:
    """The counters that outlive a connection."""

    __slots__ = ("acked", "nacked", "sent", "stale")

    def __init__(self) -> None:
        self.acked = self.nacked = self.sent = self.stale = 0
