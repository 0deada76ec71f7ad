"""The chart: messages a second, CPU per message, and latency, where there are any."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from benchmark.harness.results import Results, Row

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

_PANELS: Final = (
    ("rate_per_s", "messages a second"),
    ("broker_cpu_us", "broker CPU per message, µs (log)"),
    ("p99_ms", "p99 latency, ms"),
)
_COLOURS: Final = {"kiteq": "#1f6f8b", "redis": "#c8553d"}
_LOG: Final = {"broker_cpu_us"}
_BAR: Final = 0.38


def draw(results: Results, path: Path) -> None:
    """Write the PNG."""
    rows = results.rows()
    panels = [panel for panel in _PANELS if any(panel[0] in row.figures for row in rows)]
    if not panels:
        return
    count = max(len({row.scenario for row in rows if name in row.figures}) for name, _ in panels)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 1.6 + 0.62 * count), squeeze=False)
    for axis, (name, title) in zip(axes[0], panels, strict=True):
        _panel(axis, rows, name)
        axis.set_title(title, fontsize=10, loc="left")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", frameon=False, ncols=2)
    figure.suptitle(results.about.get("machine", ""), fontsize=8, x=0.01, ha="left", color="0.35")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, rows: list[Row], name: str) -> None:
    shown = [row for row in rows if name in row.figures]
    scenarios = list(dict.fromkeys(row.scenario for row in shown))
    systems = list(dict.fromkeys(row.system for row in shown))
    for index, system in enumerate(systems):
        mine = [row for row in shown if row.system == system]
        places = [scenarios.index(row.scenario) + (index - (len(systems) - 1) / 2) * _BAR for row in mine]
        values = [row.figures[name] for row in mine]
        errors = [
            [value - row.low[name] for row, value in zip(mine, values, strict=True)],
            [row.high[name] - value for row, value in zip(mine, values, strict=True)],
        ]
        bars = axis.barh(
            places, values, _BAR * 0.92, xerr=errors, label=system, color=_COLOURS[system], error_kw={"lw": 0.8}
        )
        axis.bar_label(bars, labels=[_short(value) for value in values], padding=5, fontsize=8)
    axis.set_yticks(range(len(scenarios)), scenarios, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.22)
    if name in _LOG:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(lambda value, _place: _short(value))
    axis.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _short(value: float) -> str:
    if value >= 10_000:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value >= 1_000 else f"{value:,.3g}"
