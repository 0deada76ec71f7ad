"""What the broker tells about itself, for administrative requests and the HTTP port alike."""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import trio

from kiteq.store.halves import State
from kiteq.values import seconds_text

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.outlet import Outlet
    from kiteq.store.halves import Halves

__all__ = ["Health", "bindings_by_topic", "health", "outlet_row", "outlet_rows", "stat", "transaction_figures"]

ROWS_PER_SLICE: Final = 500
"""Rows made before others have their turn: about a millisecond."""
SLOTS_PER_SLICE: Final = 50_000
"""The same for transactions."""
OPEN_STATES: Final = bytes(state in (State.OPEN, State.DECIDING) for state in range(256))
"""1 for a transaction that is durable and neither parked nor decided."""

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
        "counters": dict(core.counters),
        "transactions": await transaction_figures(core),
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


async def health(core: Core) -> Health:
    """Return whether the broker serves, and what somebody should look at."""
    if core.store.failure is not None:
        return Health("unavailable", [str(core.store.failure)])
    if core.draining:
        return Health("unavailable", ["the broker is shutting down"])
    reasons = []
    if core.refusing is not None:
        reasons.append(f"publishing is refused: {core.refusing[1]}")
    elif core.filling_up:
        reasons.append("the store fills up")
    full = sorted(set(core.full_topics.values()))
    if full:
        topics = len(core.full_topics)
        reasons.append(f"{topics} topics are refused because groups keep too much: {', '.join(full)}"[:500])
    figures = await transaction_figures(core)
    age = figures["oldest_open_age_s"]
    if figures["alarm"]:
        limit = seconds_text(core.settings.half_age_alarm)
        reasons.append(f"a transaction is open for {seconds_text(age)}; half_age_alarm is {limit}")
    if figures["parked"]:
        reasons.append(f"{figures['parked']} transactions are parked: nobody could say whether they were committed")
    return Health("degraded" if reasons else "ok", reasons)


async def transaction_figures(core: Core) -> Row:
    """Return how many transactions are open and parked, and how old the oldest open one is, in seconds.

    Parked ones are not among the open ones here. alarm: whether that age is over `half_age_alarm`.
    """
    tallies = core.store.halves.groups
    groups = {one.name: {"open": one.open - one.parked, "parked": one.parked} for one in tallies}
    oldest_s = await _oldest_open_s(core.store.halves)
    age = None if oldest_s is None else max(0, core.clock.epoch_ms() // 1000 - oldest_s)
    return {
        "open": sum(one["open"] for one in groups.values()),
        "parked": sum(one["parked"] for one in groups.values()),
        "oldest_open_age_s": age,
        "alarm": age is not None and age > core.settings.half_age_alarm,
        "groups": groups,
    }


async def _oldest_open_s(halves: Halves) -> int | None:
    """Return when the oldest open transaction was prepared, in seconds since 1970; there may be a million."""
    found = []
    for start in range(0, len(halves.state), SLOTS_PER_SLICE):
        some = slice(start, start + SLOTS_PER_SLICE)
        is_open = halves.state[some].translate(OPEN_STATES)
        found.append(min(compress(halves.prepared_s[some], is_open), default=None))
        await trio.lowlevel.checkpoint()
    return min((second for second in found if second is not None), default=None)
