"""What brokers tell `kiteq top`, for tests of samples and pages."""

from __future__ import annotations

from typing import Any

from kiteq.cli.samples import Look
from kiteq.cli.sights import Sight

__all__ = ["group", "lost", "overview", "seen", "topic"]

Row = dict[str, Any]


def topic(name: str, **more: Any) -> Row:
    row = {
        "topic": name, "in": 0, "out": 0, "groups": 1, "pending": 0, "pending_bytes": 0, "retrying": 0, "dead": 0,
        "oldest_age_s": None,
    }  # fmt: skip
    return row | more


def group(name: str, **more: Any) -> Row:
    row = {
        "group": name, "connections": 1, "topics": 1, "in_flight": 0, "out": 0, "pending": 0, "pending_bytes": 0,
        "retrying": 0, "dead": 0,
    }  # fmt: skip
    return row | more


def overview(
    broker_id: str, at_s: float, topics: tuple[Row, ...] = (), groups: tuple[Row, ...] = (), **more: Any
) -> Row:
    row: Row = {
        "broker_id": broker_id, "version": "0.1.0", "wire_version": 2, "epoch": 1, "uptime_s": 125, "state": "ok",
        "reasons": [], "topics": [], "at_s": at_s, "connections": 3, "connections_limit": 1024, "store_bytes": 3 << 20,
        "store_limit": 64 << 30, "disk_free": 1 << 40, "unrouted_bytes": 0, "registry": None, "accepted": 0,
        "delivered": 0, "acked": 0, "pending": 0, "retrying": 0, "dead": 0, "delayed": 0,
        "transactions": {"open": 0, "parked": 0, "oldest_age_s": None},
        "topic_count": len(topics), "group_count": len(groups), "topic_rows": list(topics), "group_rows": list(groups),
    }  # fmt: skip
    return row | more


def seen(at_ms: int, *overviews: Row | Sight) -> Look:
    """Return a look at brokers, each at the address "<its id>:1"."""
    return Look(at_ms, [one if isinstance(one, Sight) else Sight(f"{one['broker_id']}:1", one) for one in overviews])


def lost(address: str, seconds: float, state: str = "not reached") -> Sight:
    return Sight(address, None, state, f"no broker answers at {address}", seconds)
