"""A sample as a page of a terminal: a pure function of the sample and of the room there is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

from kiteq.cli.output import age_text, printable, table, time_text

__all__ = ["page"]

Row = dict[str, Any]

NOTE: Final = "NOTE"
BROKER_TITLES: Final = (
    "BROKER", "STATE", "IN/S", "OUT/S", "REGISTRY", "EPOCH", "UPTIME", "CONNECTIONS", "STORE", NOTE,
)  # fmt: skip
TOPIC_TITLES: Final = ("TOPIC", "IN/S", "OUT/S", "PENDING", "SIZE", "OLDEST", "RETRYING", "DEAD")
GROUP_TITLES: Final = ("GROUP", "CONNECTIONS", "PENDING", "SIZE", "IN FLIGHT", "RETRYING", "DEAD", "OUT/S")
TO_THE_RIGHT: Final = frozenset({"EPOCH", "UPTIME", "CONNECTIONS", "IN/S", "OUT/S", "SIZE", "OLDEST"})
BROKERS_SHARE: Final = 3
"""Of many brokers as many are shown as fit a third of the page: those first that are not well."""
NAME_COLUMNS_MIN: Final = 32
"""A longer name is shortened to this before figures are left out."""
NAME_END: Final = 6
"""As much of its end stays: of an address the port."""
GAP: Final = 2
SIZE_UNITS: Final = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def page(sample: Row, named: str, *, columns: int | None = None, lines: int | None = None) -> str:
    """Return the page of a sample; columns, lines: the room there is, None for any.

    named: what was asked for, for the title.
    """
    unwell_first = sorted(sample["brokers"], key=_unwell_first)
    brokers = _table(BROKER_TITLES, [_broker_cells(row) for row in unwell_first], columns)
    topics = _table(TOPIC_TITLES, [_topic_cells(row) for row in sample["topics"]], columns)
    groups = _table(GROUP_TITLES, [_group_cells(row) for row in sample["groups"]], columns)
    top = [_title(sample, named), *_wrapped(_totals(sample), columns), *_wrapped(_transactions(sample), columns), ""]
    more_topics, more_groups = sample["left_out"]["topics"], sample["left_out"]["groups"]
    of_topics, of_groups = len(topics) + (more_topics > 0), len(groups) + (more_groups > 0)
    if lines is not None:
        brokers = _cut(brokers, max(3, lines // BROKERS_SHARE))
        of_topics, of_groups = _shared(lines - len(top) - len(brokers) - 2, of_topics, of_groups)
    topics, groups = _cut(topics, of_topics, more_topics), _cut(groups, of_groups, more_groups)
    shown = [*top, *brokers, "", *topics, "", *groups][:lines]
    return "\n".join(line if columns is None else line[:columns].rstrip() for line in shown)


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]], columns: int | None) -> list[str]:
    """Return the lines of a table that is as wide as there is room: a figure that is cut would be a wrong one.

    So long names are shortened first, then columns from the right are left out as a whole; a note may be cut.
    """
    if columns is not None:
        widths = [max(len(str(cell)) for cell in column) for column in zip(titles, *rows, strict=True)]
        others = sum(GAP + width for title, width in zip(titles[1:], widths[1:], strict=True) if title != NOTE)
        widths[0] = min(widths[0], max(NAME_COLUMNS_MIN, columns - others))
        rows = [(_shortened(str(row[0]), widths[0]), *row[1:]) for row in rows]
        fitting, end = 0, -GAP
        for title, width in zip(titles, widths, strict=True):
            end += GAP + (len(title) if title == NOTE else width)
            fitting += end <= columns
        titles, rows = titles[:fitting], [row[:fitting] for row in rows]
    return table(titles, rows, right=TO_THE_RIGHT).split("\n")


def _shortened(name: str, room: int) -> str:
    return name if len(name) <= room else f"{name[: room - NAME_END - 3]}...{name[-NAME_END:]}"


def _wrapped(text: str, columns: int | None) -> list[str]:
    """Return a text of figures in lines that end behind a comma."""
    if columns is None:
        return [text]
    kept_together = text.replace(" ", "\xa0").replace(",\xa0", ", ")
    return [line.replace("\xa0", " ") for line in textwrap.wrap(kept_together, columns, subsequent_indent="  ")]


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
    return f"kiteq top  {time_text(sample['at_ms'])} UTC  brokers: {told or 'none'}  {printable(named.encode())}"


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
        row["address"], row["state"], _rate(row["in_per_s"]), _rate(row["out_per_s"]), _registry(row["registry"]),
        row["epoch"], age_text(row["uptime_s"]), row["connections"],
        f"{_size(row['store_bytes'])} of {_size(row['store_limit'])}", note,
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
