"""Where the broker's CPU time goes: `python benchmark/profile.py` prints microseconds per message by step.

The broker runs in a process of its own, with a counter of CPU time of the thread around each step. A step
does not count the steps it calls. What is left of the loop's thread is trio, the sockets' reads, and the
counters themselves (about half a microsecond a batch); the writer thread is told apart by the kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

# This file's own name must not stand in for the standard library's `profile`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from typing import Any, Final  # noqa: E402

import trio  # noqa: E402

from benchmark.harness.process import cpu_seconds  # noqa: E402
from benchmark.harness.servers import KiteqServer  # noqa: E402
from benchmark.scenarios.setting import Setting  # noqa: E402
from benchmark.scenarios.throughput import start_consumers, start_producers, timed  # noqa: E402
from kiteq.broker import Broker, serve  # noqa: E402
from kiteq.config import Settings  # noqa: E402
from kiteq.pipe.deliveries import Deliveries  # noqa: E402
from kiteq.pipe.pipeline import HANDLERS  # noqa: E402
from kiteq.pipe.turn import Turn  # noqa: E402
from kiteq.remoting.codec import Decoder  # noqa: E402
from kiteq.remoting.session import Session  # noqa: E402
from kiteq.store.store import Store  # noqa: E402
from kiteq.store.writer import Writer  # noqa: E402

STEPS: Final = (
    ("decode", Decoder, "feed"),
    *((handler.__name__.lower(), handler, "handle") for handler in HANDLERS),
    ("deliver", Deliveries, "dispatch"),
    ("turn", Turn, "end"),
    ("send", Session, "flush"),
    ("store, after the commit", Store, "_finish"),
)
NAMES: Final = {"persist": "store, before the commit"}
ORDER: Final = ("decode", "admit", "check", "route", "store", "respond", "deliver", "settle", "send")
TOTALS: Final = (
    "loop: trio",
    "store, writer thread",
    "other threads",
    "whole process",
    "messages a second",
    "messages in a batch",
)


class Clock:
    """CPU time of the loop's thread, by step; the time of a called step is not its caller's."""

    def __init__(self) -> None:
        self.spent_ns: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._callees_ns: list[int] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._callees_ns.append(0)
        began = time.thread_time_ns()
        try:
            yield
        finally:
            whole = time.thread_time_ns() - began
            own = whole - self._callees_ns.pop()
            self.spent_ns[name] = self.spent_ns.get(name, 0) + own
            self.calls[name] = self.calls.get(name, 0) + 1
            if self._callees_ns:
                self._callees_ns[-1] += whole

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed_step(*arguments: Any, **named: Any) -> Any:
            with self.step(name):
                return function(*arguments, **named)

        return timed_step


def _serve_profiled(bind: str, database: str) -> None:
    """Run the broker until SIGTERM; a report goes to stdout at SIGUSR1, which also starts the next one."""
    clock = Clock()
    writer: list[int] = []
    run_writer = Writer.run

    def run_noted(self: Writer) -> None:
        writer.append(threading.get_native_id())
        run_writer(self)

    setattr(Writer, "run", run_noted)  # noqa: B010 mypy forbids to assign to a method, which is the point here
    for name, owner, method in STEPS:
        setattr(owner, method, clock.around(NAMES.get(name, name), getattr(owner, method)))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            broker: Broker = await nursery.start(serve, Settings(bind=bind, db=database))
            with trio.open_signal_receiver(signal.SIGUSR1, signal.SIGTERM) as signals:
                async for number in signals:
                    if number == signal.SIGTERM:
                        break
                    print(json.dumps(_report(clock, writer[0])), flush=True)
            await broker.drain()

    trio.run(main)


def _report(clock: Clock, writer: int) -> dict[str, Any]:
    schedstat = Path(f"/proc/self/task/{writer}/schedstat").read_text().split()
    report = {
        "steps_ns": dict(clock.spent_ns),
        "calls": dict(clock.calls),
        "loop_ns": time.thread_time_ns(),
        "writer_ns": int(schedstat[0]),
        "process_ns": time.process_time_ns(),
    }
    clock.spent_ns.clear()
    clock.calls.clear()
    return report


class ProfiledServer(KiteqServer):
    """The broker of `_serve_profiled`; its reports are lines of its log."""

    def command(self) -> list[str]:
        return [sys.executable, __file__, "--serve", f"127.0.0.1:{self.port}", self.database]

    def report(self) -> dict[str, Any]:
        before = self.log_path.read_text().count('"steps_ns"')
        self._signal(signal.SIGUSR1)
        while True:
            found = [line for line in self.log_path.read_text().splitlines() if '"steps_ns"' in line]
            if len(found) > before:
                report: dict[str, Any] = json.loads(found[-1])
                return report
            time.sleep(0.01)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


def _measure(setting: Setting, groups: int) -> dict[str, float]:
    """Return microseconds per message by step; `groups` 0 publishes to an absent group."""
    with ProfiledServer(setting.folder / f"profiled-{groups}") as server, setting.crew(server) as crew:
        if not groups:
            crew.wait([crew.start("bind", **setting.load(group="group-0"))])
        consumers = start_consumers(setting, crew, groups)
        producers = start_producers(setting, crew)
        before = server.report()
        began = cpu_seconds(server.pid)
        figures, _ = timed(server, crew, producers, consumers, f"profile, {groups} groups")
        whole = (cpu_seconds(server.pid) - began) / setting.messages * 1e6
        after = server.report()
    scale = setting.messages * 1000
    table = {name: spent / scale for name, spent in after["steps_ns"].items() if spent / scale >= 0.005}
    loop = (after["loop_ns"] - before["loop_ns"]) / scale
    table["loop: trio, reads, the rest"] = loop - sum(after["steps_ns"].values()) / scale
    table["store, writer thread"] = (after["writer_ns"] - before["writer_ns"]) / scale
    process = (after["process_ns"] - before["process_ns"]) / scale
    table["other threads"] = max(0.0, process - loop - table["store, writer thread"])
    table["whole process"] = process
    table["whole process, by /proc"] = whole
    table["messages a second, profiled"] = figures["rate_per_s"]
    table["messages in a batch"] = setting.messages / max(1, after["calls"].get("check", 1))
    return table


def _print(columns: dict[str, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for table in columns.values() for name in table))
    place = {name: index for index, name in enumerate(ORDER)} | {name: len(ORDER) + 1 for name in TOTALS}
    names.sort(key=lambda name: place.get(name.partition(",")[0], len(ORDER)))
    print("| step | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name in names:
        cells = [f"{table[name]:,.2f}" if name in table else "-" for table in columns.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(description="Microseconds of broker CPU per message, by step.")
    parser.add_argument("--messages", type=int, default=300_000)
    parser.add_argument("--body", type=int, default=128)
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--prefetch", type=int, default=1000)
    parser.add_argument("--serve", nargs=2, metavar=("BIND", "DB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve_profiled(*options.serve)
        return
    with tempfile.TemporaryDirectory(prefix="kiteq-profile-") as folder:
        setting = Setting(
            Path(folder),
            messages=options.messages,
            body_bytes=options.body,
            window=options.window,
            prefetch=options.prefetch,
        )
        names = {0: "publish", 1: "end to end, 1 group", 3: "3 groups"}
        _print({name: _measure(setting, groups) for groups, name in names.items()})


if __name__ == "__main__":
    main()
