"""What a client tells about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kiteq_client.decision import Decision

__all__ = ["Counters", "Statistics"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """A moment's figures of a client; the counters began when it was entered.

    connected: addresses of the brokers connected. not_reached: why, by address, for the others that are known.
    registry: in words, whether the registry is reached where brokers are found; "" for a list of brokers.
    in_flight: messages sent and not answered. sent: messages answered, refusals included.
    received: messages delivered to this client. acked, nacked: answers given. stale: answers that came
    too late to have an effect. reconnects: connections made after the first to each broker.
    committed, rolled_back: transactions whose decision the broker has on disk. conflicts: decided the other
    way before. unknown_transactions: decisions about what the broker does not know. pending_decisions: not
    answered yet. checks: answers to the broker's checks, by `Decision.value`.
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
    committed: int = 0
    rolled_back: int = 0
    conflicts: int = 0
    unknown_transactions: int = 0
    pending_decisions: int = 0
    checks: Mapping[str, int] = field(default_factory=dict)
    registry: str = ""


class Counters:
    """The counters that outlive a connection."""

    __slots__ = (
        "acked", "checks", "committed", "conflicts", "nacked", "rolled_back", "sent", "stale", "unknown_transactions",
    )  # fmt: skip

    def __init__(self) -> None:
        self.acked = self.nacked = self.sent = self.stale = 0
        self.committed = self.rolled_back = self.conflicts = self.unknown_transactions = 0
        self.checks = {decision.value: 0 for decision in Decision}
