"""A sample as a page of a terminal: a pure function of the sample and of the room there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kiteq.cli.output import age_text, printable, table, time_text

__all__ = ["page"]

Row = dict[str, Any]

BROKER_TITLES: Final = (
    "BROKER", "STATE", "EPOCH", "UPTIME", "CONNECTIONS", "STORE", "REGISTRY", "IN/S", "OUT/S", "NOTE",
)  # fmt: skip
TOPIC_TITLES: Final = ("TOPIC", "IN/S", "OUT/S", "PENDING", "SIZE", "OLDEST", "RETRYING", "DEAD")
GROUP_TITLES: Final = ("GROUP", "CONNECTIONS", "PENDING", "SIZE", "IN FLIGHT", "RETRYING", "DEAD", "OUT/S")
TO_THE_RIGHT: Final = frozenset({"EPOCH", "UPTIME", "CONNECTIONS", "IN/S", "OUT/S", "SIZE", "OLDEST"})
BROKERS_SHARE: Final = 3
"""Of many brokers as many are shown as fit a third of the page: those first that are not well."""
SIZE_UNITS: Final = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def page(sample: Row, named: str, *, columns: int | None = None, lines: int | None = None) -> str:
    """Return the page of a sample; columns, lines: the room there is, None for any.

    named: what was asked for, for the title.
    """
    brokers = _table(BROKER_TITLES, [_broker_cells(row) for row in sorted(sample["brokers"], key=_unwell_first)])
    topics = _table(TOPIC_TITLES, [_topic_cells(row) for row in sample["topics"]])
    groups = _table(GROUP_TITLES, [_group_cells(row) for row in sample["groups"]])
    top = [_title(sample, named), _totals(sample), _transactions(sample), ""]
    more_topics, more_groups = sample["left_out"]["topics"], sample["left_out"]["groups"]
    of_topics, of_groups = len(topics) + (more_topics > 0), len(groups) + (more_groups > 0)
    if lines is not None:
        brokers = _cut(brokers, max(3, lines // BROKERS_SHARE))
        of_topics, of_groups = _shared(lines - len(top) - len(brokers) - 2, of_topics, of_groups)
    topics, groups = _cut(topics, of_topics, more_topics), _cut(groups, of_groups, more_groups)
    shown = [*top, *brokers, "", *topics, "", *groups][:lines]
    return "\n".join(line if columns is None else line[:columns].rstrip() for line in shown)


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return table(titles, rows, right=TO_THE_RIGHT).split("\n")


def _cut(shown: list[str], room: int, left_out: int = 0) -> list[str]:
    """Return the lines of a table that fit, and in the last of them how many rows do not."""
    if len(shown) <= room and not left_out:
        return shown
    kept = shown[: max(1, room - 1)]
    return [*kept, _more(len(shown) - len(kept) + left_out)][: max(0, room)]


def _more(count: int) -> str:
    return f"... {count} more"


def _shared(room: int, first: int, second: int) -> tuple[int, int]:
    """Return how many lines of the room each of two tables gets: what one does not need is the other's."""
    half = room // 2
    if first <= half:
        return first, room - first
    if second <= room - half:
        return room - second, second
    return half, room - half


def _unwell_first(row: Row) -> tuple[bool, str]:
    return row["state"] == "ok", row["address"]


def _title(sample: Row, named: str) -> str:
    states: dict[str, int] = {}
    for row in sample["brokers"]:
        states[row["state"]] = states.get(row["state"], 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return f"kiteq top  {printable(named.encode())}  {time_text(sample['at_ms'])} UTC  brokers: {told or 'none'}"


def _totals(sample: Row) -> str:
    totals = sample["totals"]
    parts = [
        f"in {_rate(totals['in_per_s'])}/s",
        f"out {_rate(totals['out_per_s'])}/s",
        *(f"{name} {totals[name]:,}" for name in ("pending", "retrying")),
        f"dead letters {totals['dead']:,}",
        f"delayed {totals['delayed']:,}",
        f"unrouted {_size(totals['unrouted_bytes'])}",
    ]
    return "messages: " + ", ".join(parts)


def _transactions(sample: Row) -> str:
    of = sample["transactions"]
    oldest = "" if of["oldest_age_s"] is None else f", the oldest {age_text(of['oldest_age_s'])} old"
    return f"transactions: open {of['open']:,}, parked {of['parked']:,}{oldest}"


def _broker_cells(row: Row) -> list[object]:
    note = "; ".join(row["reasons"])
    if row["lost_s"] is not None:
        state = f"{row['state']}, {age_text(row['lost_s'])}"
        return [row["address"], state, *["-"] * (len(BROKER_TITLES) - 3), note]
    return [
        row["address"], row["state"], row["epoch"], age_text(row["uptime_s"]), row["connections"],
        f"{_size(row['store_bytes'])} of {_size(row['store_limit'])}", _registry(row["registry"]),
        _rate(row["in_per_s"]), _rate(row["out_per_s"]), note,
    ]  # fmt: skip


def _registry(told: Row | None) -> str:
    if told is None:
        return "embedded"
    if not told["degraded"]:
        return "ok"
    return f"{'degraded' if told['found'] else 'not found'}, {age_text(told['since_s'])}"


def _topic_cells(row: Row) -> list[object]:
    oldest = "-" if row["oldest_age_s"] is None else age_text(row["oldest_age_s"])
    return [
        row["topic"], _rate(row["in_per_s"]), _rate(row["out_per_s"]), row["pending"], _size(row["pending_bytes"]),
        oldest, row["retrying"], row["dead"],
    ]  # fmt: skip


def _group_cells(row: Row) -> list[object]:
    return [
        row["group"], row["connections"], row["pending"], _size(row["pending_bytes"]), row["in_flight"],
        row["retrying"], row["dead"], _rate(row["out_per_s"]),
    ]  # fmt: skip


def _rate(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:.1f}" if 0 < rate < 10 else f"{rate:,.0f}"


def _size(count: int) -> str:
    """Return a size with one digit after the point, like 1.5GiB."""
    for unit, size in SIZE_UNITS:
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + unit
    return f"{count}B"
