"""What the broker tells about itself, for administrative requests and the HTTP port alike."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import trio

from kiteq.values import seconds_text

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.outlet import Outlet

__all__ = ["Health", "bindings_by_topic", "health", "outlet_row", "outlet_rows", "stat", "transaction_figures"]

ROWS_PER_SLICE: Final = 500
"""Rows made before others have their turn: about a millisecond."""

Row = dict[str, Any]


class Health(NamedTuple):
    """Whether the broker does its work, with the reasons for people when something is wrong.

    `degraded`: it serves, but somebody should look. `unavailable`: clients have to go elsewhere.
    """

    status: Literal["ok", "degraded", "unavailable"]
    reasons: list[str]


async def stat(core: Core) -> Row:
    """Return counters and sizes: bytes and seconds as the names say."""
    usage = await trio.to_thread.run_sync(core.store.usage)
    return {
        "broker_id": core.store.broker_id,
        "epoch": core.store.epoch,
        "uptime_s": int(core.clock.monotonic() - core.started_at),
        "connections": len(core.peers),
        "commits": core.store.last_commit,
        "store_bytes": usage.used,
        "store_limit": usage.limit,
        "disk_free": usage.disk_free,
        "unrouted_bytes": core.unrouted_bytes,
        "delayed": {
            "messages": core.delays.messages,
            "bytes": core.delays.size,
            "next_due_ms": core.delays.next_ms,
        },
        "damaged_records": core.store.damaged_records,
        "refusing": None if core.refusing is None else core.refusing[1],
        "draining": core.draining,
        "registry": registry_figures(core),
        "counters": dict(core.counters),
        "transactions": transaction_figures(core),
    }


def outlet_row(outlet: Outlet) -> Row:
    """Return what a group has in a topic; counts are messages, `pending_bytes` are bytes."""
    subscription = outlet.subscription
    return {
        "group": subscription.group,
        "topic": subscription.topic.name,
        "bindings": [
            {
                "kind": binding.kind.name.lower(),
                "pattern": binding.pattern,
                "watermark": binding.watermark,
                "persistent": binding.persistent,
            }
            for binding in subscription.bindings
        ],
        "members": len(outlet.group.members),
        "pending": subscription.pending,
        "pending_bytes": subscription.pending_bytes,
        "in_flight": outlet.leased,
        "retrying": subscription.retrying,
        "dead": subscription.dead,
        "dropped": outlet.dropped,
        "damaged": outlet.damaged,
    }


async def outlet_rows(core: Core) -> list[Row]:
    """Return the row of every group and topic; there may be very many, so others have their turn between."""
    rows = []
    for number, outlet in enumerate(core.router.outlets(), 1):
        if not outlet.closed:
            rows.append(outlet_row(outlet))
        if number % ROWS_PER_SLICE == 0:
            await trio.lowlevel.checkpoint()
    return rows


async def bindings_by_topic(core: Core) -> dict[str, dict[str, list[Row]]]:
    """Return all bindings by topic and group."""
    topics: dict[str, dict[str, list[Row]]] = {}
    for row in await outlet_rows(core):
        topics.setdefault(row["topic"], {})[row["group"]] = row["bindings"]
    return topics


def health(core: Core) -> Health:
    """Return whether the broker serves, and what somebody should look at."""
    if core.store.failure is not None:
        return Health("unavailable", [str(core.store.failure)])
    if core.draining:
        return Health("unavailable", ["the broker is shutting down"])
    reasons = []
    registry = registry_figures(core)
    if registry is not None and registry["degraded"]:
        since = seconds_text(registry["since_s"])
        reasons.append(f"the registry, for {since}: {registry['reason']}; going on with the bindings known")
    if core.refusing is not None:
        reasons.append(f"publishing is refused: {core.refusing[1]}")
    elif core.filling_up:
        reasons.append("the store fills up")
    full = sorted(set(core.full_topics.values()))
    if full:
        topics = len(core.full_topics)
        reasons.append(f"{topics} topics are refused because groups keep too much: {', '.join(full)}"[:500])
    figures = transaction_figures(core)
    if figures["alarm"]:
        age, limit = seconds_text(figures["oldest_age_s"]), seconds_text(core.settings.half_age_alarm)
        reasons.append(f"a transaction is undecided for {age}; half_age_alarm is {limit}")
    if figures["parked"]:
        reasons.append(f"{figures['parked']} transactions are parked: nobody could say whether they were committed")
    return Health("degraded" if reasons else "ok", reasons)


def registry_figures(core: Core) -> Row | None:
    """Return whether the registry is as it should be, since when, in seconds, and why not; None without one."""
    if core.registry is None:
        return None
    state = core.registry.state
    return {
        "degraded": state.degraded,
        "since_s": round(max(0.0, time.monotonic() - state.since), 1),
        "found": not state.session_over,
        "reason": state.reason,
    }


def transaction_figures(core: Core) -> Row:
    """Return how many transactions are open and parked, and how old the oldest of both is, in seconds.

    The age is found out every few seconds; None when there is none. alarm: whether it is over `half_age_alarm`.
    """
    now_s = core.clock.epoch_ms() // 1000
    groups = {
        one.name: {
            "open": one.open - one.parked,
            "parked": one.parked,
            "oldest_age_s": max(0, now_s - one.oldest_s) if one.open and one.oldest_s else None,
        }
        for one in core.store.halves.groups
    }
    oldest = max((one["oldest_age_s"] for one in groups.values() if one["oldest_age_s"] is not None), default=None)
    return {
        "open": sum(one["open"] or 0 for one in groups.values()),
        "parked": sum(one["parked"] or 0 for one in groups.values()),
        "oldest_age_s": oldest,
        "alarm": oldest is not None and oldest >= core.settings.half_age_alarm,
        "groups": groups,
    }
