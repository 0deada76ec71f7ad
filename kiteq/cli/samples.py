"""From two looks at the brokers to one sample: what `kiteq top --json` prints, and what a page is made of.

    at_ms         when, since 1970
    interval_s    between the two looks; null in the first sample, in which no rate is known
    brokers       address, broker_id, version, epoch, uptime_s, reasons,
                  state (ok, degraded, draining, unavailable, refused, not reached), lost_s (for how long it
                  has told nothing), connections, connections_limit, store_bytes, store_limit, disk_free,
                  registry (degraded, since_s, found, reason; null: none), in_per_s, out_per_s
    topics        topic, in_per_s, out_per_s, pending, pending_bytes, retrying, dead, oldest_age_s
    groups        group, connections, pending, pending_bytes, in_flight, retrying, dead, out_per_s
    transactions  open, parked, oldest_age_s
    totals        in_per_s, out_per_s, pending, retrying, dead, delayed, unrouted_bytes
    left_out      topics, groups: at least so many are not listed; a broker tells of the 1,000 with most waiting

Figures are summed over the brokers that answered. pending: deliveries routed and not settled, those in flight
included, those that wait for another attempt (retrying) not. in: messages that became deliverable, of a broker:
accepted. out: deliveries acked. oldest_age_s: of the oldest pending message. What is not known is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from kiteq.cli.sights import Sight

__all__ = ["Look", "sample"]

Row = dict[str, Any]

BROKER_FIELDS: Final = (
    "broker_id", "version", "epoch", "uptime_s", "connections", "connections_limit", "store_bytes", "store_limit",
    "disk_free", "registry",
)  # fmt: skip
TOPIC_SUMS: Final = ("pending", "pending_bytes", "retrying", "dead")
GROUP_SUMS: Final = ("connections", "pending", "pending_bytes", "in_flight", "retrying", "dead")
TOTAL_SUMS: Final = ("pending", "retrying", "dead", "delayed", "unrouted_bytes")


class Look(NamedTuple):
    """What was seen of all brokers at one moment, in milliseconds since 1970."""

    at_ms: int
    sights: list[Sight]


class _Pair(NamedTuple):
    """What one broker tells, and what it told before in the same life; seconds between both, None without before."""

    before: Row | None
    now: Row
    seconds: float | None

    def rate(self, count: int, before: int | None) -> float | None:
        if self.seconds is None or before is None:
            return None
        # Fewer than before: what was counted is gone, like a group, and counted anew.
        return round((count - before if count >= before else count) / self.seconds, 3)


def sample(before: Look | None, now: Look) -> Row:
    """Return what two looks tell; `before` is None for the first one."""
    earlier = {} if before is None else {sight.address: sight.overview for sight in before.sights}
    pairs = {
        sight.address: _pair(earlier.get(sight.address), sight.overview)
        for sight in now.sights
        if sight.overview is not None
    }
    told = [pair.now for pair in pairs.values()]
    brokers = [_broker_row(sight, pairs.get(sight.address)) for sight in now.sights]
    ages = [one["transactions"]["oldest_age_s"] for one in told]
    return {
        "at_ms": now.at_ms,
        "interval_s": None if before is None else (now.at_ms - before.at_ms) / 1000,
        "brokers": brokers,
        "topics": _topics(pairs.values()),
        "groups": _groups(pairs.values()),
        "transactions": {
            "open": sum(one["transactions"]["open"] for one in told),
            "parked": sum(one["transactions"]["parked"] for one in told),
            "oldest_age_s": max((age for age in ages if age is not None), default=None),
        },
        "totals": {
            "in_per_s": _total(row["in_per_s"] for row in brokers),
            "out_per_s": _total(row["out_per_s"] for row in brokers),
            **{name: sum(one[name] for one in told) for name in TOTAL_SUMS},
        },
        "left_out": {
            "topics": max((one["topic_count"] - len(one["topic_rows"]) for one in told), default=0),
            "groups": max((one["group_count"] - len(one["group_rows"]) for one in told), default=0),
        },
    }


def _pair(before: Row | None, now: Row) -> _Pair:
    if before is None or (before["broker_id"], before["epoch"]) != (now["broker_id"], now["epoch"]):
        return _Pair(None, now, None)
    seconds = now["at_s"] - before["at_s"]
    return _Pair(before, now, seconds) if seconds > 0 else _Pair(None, now, None)


def _broker_row(sight: Sight, pair: _Pair | None) -> Row:
    row: Row = {"address": sight.address, "state": sight.state, "reasons": [], "lost_s": None}
    row |= dict.fromkeys((*BROKER_FIELDS, "in_per_s", "out_per_s"))
    if pair is None:
        return row | {"reasons": [sight.error], "lost_s": round(sight.lost_s or 0.0, 1)}
    was = pair.before or {}
    row |= {name: pair.now[name] for name in (*BROKER_FIELDS, "state", "reasons")}
    row["in_per_s"] = pair.rate(pair.now["accepted"], was.get("accepted"))
    row["out_per_s"] = pair.rate(pair.now["acked"], was.get("acked"))
    return row


def _topics(pairs: Iterable[_Pair]) -> list[Row]:
    each = list(pairs)
    rows = _merged(each, "topic", TOPIC_SUMS, ("in", "out"))
    for pair in each:
        for one in pair.now["topic_rows"]:
            row = rows[one["topic"]]
            ages = [age for age in (row.get("oldest_age_s"), one["oldest_age_s"]) if age is not None]
            row["oldest_age_s"] = max(ages, default=None)
    return _most_first(rows.values(), "topic", "in_per_s")


def _groups(pairs: Iterable[_Pair]) -> list[Row]:
    return _most_first(_merged(list(pairs), "group", GROUP_SUMS, ("out",)).values(), "group", "out_per_s")


def _merged(pairs: Sequence[_Pair], kind: str, sums: Sequence[str], counts: Sequence[str]) -> dict[str, Row]:
    """Return one row for each topic or group, of all brokers."""
    merged: dict[str, Row] = {}
    for pair in pairs:
        earlier: dict[str, Row] = {}
        unseen: int | None = None
        if pair.before is not None:
            earlier = {row[kind]: row for row in pair.before[f"{kind}_rows"]}
            # What was not there a moment ago began at 0, unless it was only not among those told of.
            unseen = 0 if pair.before[f"{kind}_count"] == len(earlier) else None
        for row in pair.now[f"{kind}_rows"]:
            into = merged.setdefault(row[kind], {kind: row[kind], **dict.fromkeys(f"{name}_per_s" for name in counts)})
            was = earlier.get(row[kind])
            for name in counts:
                rate = pair.rate(row[name], unseen if was is None else was[name])
                into[f"{name}_per_s"] = _total((into[f"{name}_per_s"], rate))
            for name in sums:
                into[name] = into.get(name, 0) + row[name]
    return merged


def _most_first(rows: Iterable[Row], name: str, rate: str) -> list[Row]:
    return sorted(rows, key=lambda row: (-(row["pending"] + row["retrying"]), -(row[rate] or 0.0), row[name]))


def _total(rates: Iterable[float | None]) -> float | None:
    """Return the sum of those that are known."""
    known = [rate for rate in rates if rate is not None]
    return round(sum(known), 3) if known else None
