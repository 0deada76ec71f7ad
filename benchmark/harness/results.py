"""What was measured: runs, their medians, and the marks they are compared with."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Final


@dataclass
class Run:
    """One run of one scenario against one system. Figures have their unit at the end of their name."""

    scenario: str
    system: str
    figures: dict[str, float]
    lost: int = 0
    duplicates: int = 0
    checked: bool = False
    """Whether ids were compared: there are none to compare where nothing consumes."""
    note: str = ""


@dataclass
class Row:
    """The median of the runs of one scenario against one system, with the range of each figure."""

    scenario: str
    system: str
    runs: int
    figures: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    lost: int
    duplicates: int
    checked: bool
    note: str


@dataclass(frozen=True)
class Mark:
    """A figure to reach: `least` or `most` of one figure, or of the ratio to Redis."""

    scenario: str
    figure: str
    least: float | None = None
    most: float | None = None
    against_redis: bool = False

    def met(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def wanted(self) -> str:
        return f">= {self.least:,g}" if self.least is not None else f"<= {self.most:,g}"


MARKS: Final = (
    Mark("publish 128 B", "rate_per_s", least=1.0, against_redis=True),
    Mark("publish 128 B", "broker_cpu_us", most=4.0),
    Mark("e2e 128 B", "rate_per_s", least=1.0, against_redis=True),
    Mark("e2e 128 B", "broker_cpu_us", most=7.0),
    Mark("e2e 1024 B", "rate_per_s", least=2.0, against_redis=True),
    Mark("fanout 128 B", "rate_per_s", least=100_000),
    Mark("window1", "times_floor", most=2.5),
    Mark("tasks", "rate_per_s", least=25_000),
    Mark("steady even", "p50_ms", most=3.0),
    Mark("steady even", "p99_ms", most=15.0),
    Mark("steady even", "broker_core_percent", most=35.0),
    Mark("steady ticks", "p50_ms", most=3.0),
    Mark("steady ticks", "p99_ms", most=15.0),
    Mark("steady ticks", "broker_core_percent", most=35.0),
    Mark("backlog publish", "worst_to_first_fifth", most=1.2),
    Mark("backlog publish", "rss_anon_mib", most=400),
    Mark("backlog drain", "rate_per_s", least=60_000),
    Mark("restart", "serving_s", most=2.0),
    Mark("idle", "rss_anon_mib", most=60),
    Mark("idle", "broker_core_percent", most=0.5),
    Mark("tx frames", "times_plain", most=3.0),
    Mark("tx tasks", "times_plain", most=3.0),
    Mark("tx steady", "p99_ms", most=15.0),
    Mark("tx open", "serving_s", most=5.0),
    Mark("tx open", "bytes_each", most=400),
    Mark("64 tasks, kill -9", "gap_s", most=3.0),
    Mark("64 tasks, kill -9 and restart", "gap_s", most=3.0),
    Mark("64 tasks, drain", "gap_s", most=3.0),
    Mark("64 tasks, drain", "errors", most=0),
    Mark("1,000/s, kill -9", "gap_s", most=3.0),
    Mark("1,000/s, kill -9 and restart", "gap_s", most=3.0),
    Mark("1,000/s, drain", "gap_s", most=3.0),
    Mark("1,000/s, drain", "errors", most=0),
)


@dataclass
class Results:
    """Everything one call of the benchmark found."""

    about: dict[str, str]
    runs: list[Run] = field(default_factory=list)
    as_marked: bool = True
    """Whether the settings are those the marks are for."""

    def rows(self) -> list[Row]:
        found: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            found.setdefault((run.scenario, run.system), []).append(run)
        return [_row(scenario, system, runs) for (scenario, system), runs in found.items()]

    def judged(self) -> list[tuple[Mark, float, bool]]:
        """Return each mark for which there is a figure, the figure, and whether it is met."""
        rows = {(row.scenario, row.system): row for row in self.rows()}
        judged = []
        for mark in MARKS if self.as_marked else ():
            ours, theirs = rows.get((mark.scenario, "kiteq")), rows.get((mark.scenario, "redis"))
            if ours is None or mark.figure not in ours.figures or (mark.against_redis and theirs is None):
                continue
            value = ours.figures[mark.figure]
            if mark.against_redis and theirs is not None:
                value /= theirs.figures[mark.figure]
            judged.append((mark, value, mark.met(value)))
        return judged

    def ratios(self) -> dict[str, float]:
        """Return the rate of kiteq divided by the rate of Redis, by scenario; medians of alternating runs."""
        rows = {(row.scenario, row.system): row for row in self.rows()}
        return {
            scenario: row.figures["rate_per_s"] / theirs.figures["rate_per_s"]
            for (scenario, system), row in rows.items()
            if system == "kiteq" and "rate_per_s" in row.figures and (theirs := rows.get((scenario, "redis")))
        }

    def as_json(self) -> dict[str, object]:
        return {
            "about": self.about,
            "rows": [dataclasses.asdict(row) for row in self.rows()],
            "ratios": self.ratios(),
            "marks": [
                {**dataclasses.asdict(mark), "measured": value, "met": met} for mark, value, met in self.judged()
            ],
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }


def _row(scenario: str, system: str, runs: list[Run]) -> Row:
    names = [name for name in runs[0].figures if all(name in run.figures for run in runs)]
    values = {name: [run.figures[name] for run in runs] for name in names}
    return Row(
        scenario,
        system,
        len(runs),
        {name: statistics.median(values[name]) for name in names},
        {name: min(values[name]) for name in names},
        {name: max(values[name]) for name in names},
        sum(run.lost for run in runs),
        sum(run.duplicates for run in runs),
        all(run.checked for run in runs),
        "; ".join(sorted({run.note for run in runs if run.note})),
    )
