"""Measure kiteq: `python benchmark/run.py --help`. Method and results: benchmark/README.md."""

from __future__ import annotations

import sys
from pathlib import Path

# The folder of this script holds a `profile.py`, which must not stand in for the standard library's.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import datetime as dt  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from importlib.metadata import version  # noqa: E402
from typing import Final  # noqa: E402

from benchmark.harness import chart, report  # noqa: E402
from benchmark.harness.process import ROOT, in_memory, machine  # noqa: E402
from benchmark.harness.results import Results, Run  # noqa: E402
from benchmark.harness.servers import BenchmarkError  # noqa: E402
from benchmark.load.channel import NUMBER  # noqa: E402
from benchmark.scenarios import cluster, endurance, failover, latency, throughput, transactions  # noqa: E402
from benchmark.scenarios.setting import Setting  # noqa: E402

RESULTS: Final = ROOT / "benchmark" / "results"
MARKED_WINDOW: Final = 1_000
"""The marks to reach are for this window, LMDB, and receipts that wait for the disk."""
QUICK_MESSAGES: Final = 50_000
FANOUT_GROUPS: Final = 3

Scenario = Callable[[Setting, str], list[Run]]


def _fanout(setting: Setting, system: str) -> list[Run]:
    groups = setting.groups if setting.groups > 1 else FANOUT_GROUPS
    return [throughput.end_to_end(dataclasses.replace(setting, groups=groups), system)]


def _large(setting: Setting, system: str) -> list[Run]:
    return [throughput.end_to_end(dataclasses.replace(setting, body_bytes=1024), system)]


def _steady(setting: Setting, system: str) -> list[Run]:
    return [latency.steady(setting, system, even=even) for even in (True, False)]


SCENARIOS: Final[dict[str, tuple[Scenario, bool]]] = {
    "publish": (lambda setting, system: [throughput.publish(setting, system)], True),
    "e2e": (lambda setting, system: [throughput.end_to_end(setting, system)], True),
    "e2e-1k": (_large, True),
    "fanout": (_fanout, True),
    "window1": (lambda setting, system: [latency.window_1(setting, system)], True),
    "tasks": (lambda setting, system: [latency.tasks(setting, system)], False),
    "steady": (_steady, False),
    "backlog": (endurance.backlog, False),
    "restart": (lambda setting, system: [endurance.restart(setting, system)], False),
    "crash": (lambda setting, system: [endurance.crash(setting, system)], False),
    "idle": (lambda setting, system: [endurance.idle(setting, system)], False),
    "tx": (transactions.cost, False),
    "tx-tasks": (transactions.cost_tasks, False),
    "tx-steady": (lambda setting, system: [transactions.steady(setting, system)], False),
    "tx-open": (lambda setting, system: [transactions.open_halves(setting, system)], False),
    "cluster": (cluster.throughput, False),
    "discovery": (cluster.discovery, False),
    "failover": (failover.failover, False),
}
"""Each scenario by name, and whether Redis does the same work too."""
ONCE: Final = {"backlog", "restart", "crash", "idle", "tx-open", "discovery", "failover"}
"""Scenarios that repeat the same thing many times within one run."""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure kiteq on this machine, and check that nothing is lost.")
    add = parser.add_argument
    add("--scenario", action="append", choices=[*SCENARIOS, "all"], help="may be repeated (default: publish and e2e)")
    add("--messages", type=int, help="messages per throughput run (default 1,000,000)")
    add("--body", type=int, default=128, help="bytes of a body (default 128)")
    add("--window", type=int, default=1000, help="messages sent and not yet answered, per producer (default 1000)")
    add("--prefetch", type=int, default=1000, help="unacked messages per consumer (default 1000)")
    add("--groups", type=int, default=1, help="consumer groups of e2e; fanout takes 3 unless more are asked for")
    add("--connections", type=int, default=1, help="producers, each a process of its own (default 1)")
    add("--consumers", type=int, default=1, help="consumers of each group, each a process of its own (default 1)")
    add("--flush", choices=["sync", "async"], default="sync", help="whether a receipt waits for the disk")
    add("--db", help="database URL (default: LMDB in a new temporary folder for each run)")
    add("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the temporary folders are made")
    add("--against", choices=["redis"], help="the same work through Redis Streams, in alternating runs")
    add("--redis-overlap", action="store_true", help="Redis: two half windows under way instead of one whole")
    add("--runs", type=int, help="runs of each (default 3; scenarios that repeat within a run: 1)")
    add("--loop", choices=["trio", "asyncio"], default="trio", help="event loop of the clients")
    add("--quick", action="store_true", help="small counts and one run: does it work at all?")
    add("--json", type=Path, help="where to write the JSON (default benchmark/results/<time>.json)")
    add("--chart", type=Path, help="where to write the chart (default benchmark/results/<time>.png)")
    add("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args()
    if options.body < NUMBER.size:
        parser.error(f"--body must be at least {NUMBER.size}: each body carries its number and a time")
    if not options.dir.is_dir():
        parser.error(f"--dir: there is no folder {options.dir}")
    return options


def _setting(options: argparse.Namespace, folder: Path) -> Setting:
    return Setting(
        folder=folder,
        messages=options.messages or (QUICK_MESSAGES if options.quick else 1_000_000),
        body_bytes=options.body,
        window=options.window,
        prefetch=options.prefetch,
        groups=options.groups,
        connections=options.connections,
        consumers=options.consumers,
        flush=options.flush,
        database=options.db,
        systems=("kiteq", "redis") if options.against else ("kiteq",),
        runs=options.runs or (1 if options.quick else 3),
        loop=options.loop,
        overlap=options.redis_overlap,
        quick=options.quick,
        topic=f"benchmark-{folder.name}",
    )


def _measure(setting: Setting, names: list[str], asked_runs: int | None, results: Results) -> None:
    for name in names:
        scenario, has_redis = SCENARIOS[name]
        systems = [system for system in setting.systems if system == "kiteq" or has_redis]
        runs = 1 if name in ONCE and not asked_runs else setting.runs
        for turn in range(runs):
            for system in systems:
                print(f"{name}, {system}, run {turn + 1} of {runs}", file=sys.stderr, flush=True)
                results.runs += scenario(setting, system)


def _about(options: argparse.Namespace) -> dict[str, str]:
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "kiteq": version("kiteq"),
        "loop": options.loop,
        "database": options.db or "lmdb",
        "flush": options.flush,
        "window": str(options.window),
        "prefetch": str(options.prefetch),
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    }


def _write(results: Results, options: argparse.Namespace) -> None:
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    json_path = options.json or RESULTS / f"{stamp}.json"
    chart_path = options.chart or RESULTS / f"{stamp}.png"
    for path in (json_path, chart_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(results.as_json(), indent=2) + "\n")
    chart.draw(results, chart_path)
    print(f"\n{json_path}\n{chart_path}", file=sys.stderr)


def main() -> int:
    """Run what was asked for; the exit status is 1 when a message is missing or the benchmark could not go on."""
    options = _options()
    wanted = options.scenario or ["publish", "e2e"]
    names = list(SCENARIOS) if "all" in wanted else list(dict.fromkeys(wanted))
    if in_memory(options.dir):
        print(f"warning: {options.dir} is in memory, fsync costs nothing there; see --dir", file=sys.stderr)
    as_marked = options.window == MARKED_WINDOW and options.flush == "sync" and options.db is None
    results = Results(_about(options), as_marked=as_marked)
    failure = ""
    with tempfile.TemporaryDirectory(prefix="kiteq-benchmark-", dir=options.dir) as folder:
        try:
            _measure(_setting(options, Path(folder)), names, options.runs, results)
        except BenchmarkError as error:
            failure = str(error)
    if results.runs:
        print(report.text(results, markdown=options.markdown))
        _write(results, options)
    lost = sum(run.lost for run in results.runs)
    if lost:
        print(f"LOST: {lost} messages were accepted and never delivered", file=sys.stderr)
    if failure:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if lost or failure else 0


if __name__ == "__main__":
    sys.exit(main())
