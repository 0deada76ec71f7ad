"""Results as a table for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.harness.results import Results, Row

_COLUMNS = (
    ("rate_per_s", "msgs/s", "{:,.0f}"),
    ("broker_cpu_us", "broker µs", "{:.2f}"),
    ("producer_cpu_us", "producer µs", "{:.2f}"),
    ("consumer_cpu_us", "consumer µs", "{:.2f}"),
    ("broker_core_percent", "broker % core", "{:.1f}"),
    ("p50_ms", "p50 ms", "{:.3f}"),
    ("p99_ms", "p99 ms", "{:.3f}"),
    ("rss_anon_mib", "RssAnon MiB", "{:.0f}"),
    ("other_core_percent", "others % core", "{:.0f}"),
)
_DETAILS = {
    "commit_p50_ms": "p50 of a bare commit, ms",
    "echo_p50_ms": "p50 of an echo, ms",
    "times_floor": "p50 over (commit + echo)",
    "lateness_p99_ms": "producer behind its schedule, p99, ms",
    "fifth_1_cpu_us": "broker µs, 1st fifth",
    "fifth_2_cpu_us": "2nd fifth",
    "fifth_3_cpu_us": "3rd fifth",
    "fifth_4_cpu_us": "4th fifth",
    "fifth_5_cpu_us": "5th fifth",
    "worst_to_first_fifth": "worst over first fifth",
    "serving_s": "start to serving after kill -9, s",
    "serving_after_stop_s": "after a clean stop, s",
    "times_plain": "times a plain send, by rate",
    "times_plain_cpu": "times a plain send, by CPU of the broker",
    "bytes_each": "RssAnon of each open transaction, bytes",
    "restarted_bytes_each": "after the restart",
    "retries": "retries of the producers",
    "times_one_broker": "rate over that of one broker",
    "share_least": "least share of a broker",
    "share_most": "largest",
    "first_ack_p50_s": "serving to its first ack, p50 s",
    "first_ack_max_s": "worst",
    "first_delivery_p50_s": "to its first delivery, p50 s",
    "first_delivery_max_s": "worst",
    "confirmed_p50_ms": "asked to confirmed, p50 ms",
    "confirmed_max_ms": "worst",
    "in_force_p50_ms": "asked to in force at the other broker, p50 ms",
    "in_force_max_ms": "worst",
    "rate_after_per_s": "answers in the second after",
    "share_before": "its share before",
    "gap_s": "longest gap between two receipts, s",
    "slowest_s": "slowest answered call, s",
    "under_way": "calls under way there",
    "under_way_answered": "of these answered",
    "timed_out": "calls ended by SendTimeout",
    "errors": "by any error",
    "rounds": "rounds",
}
_COUNTS = {"retries", "under_way", "under_way_answered", "timed_out", "errors", "rounds", "rate_after_per_s"}


def _checked(row: Row) -> str:
    return f"{row.lost} / {row.duplicates}" if row.checked else "-"


def _cells(results: Results) -> tuple[list[str], list[list[str]]]:
    rows = results.rows()
    columns = [column for column in _COLUMNS if any(column[0] in row.figures for row in rows)]
    ratios = results.ratios()
    head = ["scenario", "system", "runs", *(title for _, title, _ in columns), "lost / repeated"]
    if ratios:
        head.append("ratio")
    lines = []
    for row in rows:
        line = [row.scenario, row.system, str(row.runs)]
        line += [_value(row, name, form) for name, _, form in columns]
        line.append(_checked(row))
        if ratios:
            line.append(f"{ratios[row.scenario]:.2f}" if row.system == "kiteq" and row.scenario in ratios else "")
        lines.append(line)
    return head, lines


def _value(row: Row, name: str, form: str) -> str:
    if name not in row.figures:
        return "-"
    text = form.format(row.figures[name])
    if name == "rate_per_s" and row.runs > 1:
        text += f" ({row.low[name] / 1000:,.0f}k-{row.high[name] / 1000:,.0f}k)"
    return text


def _detail_lines(results: Results) -> list[str]:
    lines = []
    for row in results.rows():
        known = [
            f"{text} {row.figures[name]:,.{0 if name in _COUNTS else 3}f}"
            for name, text in _DETAILS.items()
            if name in row.figures
        ]
        notes = [row.note] if row.note else []
        if row.high.get("other_core_percent", 0.0) > DISTURBED_PERCENT:
            notes.append(f"DISTURBED: other work took up to {row.high['other_core_percent']:.0f} % of a core")
        if known or notes:
            lines.append(f"{row.scenario}, {row.system}: {'; '.join([*known, *notes])}")
    return lines


def _mark_cells(results: Results) -> list[list[str]]:
    cells = []
    for mark, value, met in results.judged():
        figure = f"kiteq/redis {mark.figure}" if mark.against_redis else mark.figure
        cells.append([mark.scenario, figure, mark.wanted(), f"{value:,.2f}", "met" if met else "MISSED"])
    return cells


DISTURBED_PERCENT = 25.0
"""Above this share of a core a run says more about its neighbours."""
_MARK_HEAD = ["scenario", "figure", "wanted", "measured", ""]


def _plain(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[index]) for line in [head, *lines]) for index in range(len(head))]
    left = 2
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, ["-" * width for width in widths], *lines]
    )


def _piped(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def text(results: Results, *, markdown: bool = False) -> str:
    """Return everything worth reading: the table, the details, and the marks that were to be reached."""
    table = _piped if markdown else _plain
    parts = [" · ".join(f"{name} {value}" for name, value in results.about.items()), table(*_cells(results))]
    if details := _detail_lines(results):
        parts.append("\n".join(f"- {line}" for line in details))
    if marks := _mark_cells(results):
        parts.append(table(_MARK_HEAD, marks))
    return "\n\n".join(parts)
