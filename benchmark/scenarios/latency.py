"""Window 1, many waiting tasks, and a steady rate: how long one message takes."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, Final

from benchmark.harness.process import free_port
from benchmark.harness.results import Run
from benchmark.scenarios.setting import Meter, Setting, checked_run
from benchmark.scenarios.throughput import start_consumers, timed

WINDOW_1_SENDS: Final = 3_000
MARK_ROUNDS: Final = 2_000
TASKS: Final = 256
STEADY_PER_SECOND: Final = 5_000
FILL: Final = 500_000
"""As many ids as the broker remembers: the duplicate window is full when the steady part begins."""


def _floor(setting: Setting) -> tuple[float, float]:
    """Return p50 in ms of a bare LMDB commit, and of an echo through trio between two processes."""
    count = setting.scaled(MARK_ROUNDS, 500)
    with setting.crew(None) as crew:
        commit = crew.run("commit", system="marks", count=count)
        port = free_port()
        server = crew.start("echo_server", system="marks", port=port)
        echo = crew.run("echo_client", system="marks", port=port, count=count)
        server.command("stop")
        crew.wait([server])
    return commit["latencies_ms"]["p50"], echo["latencies_ms"]["p50"]


def window_1(setting: Setting, system: str) -> Run:
    """One send after the other. The floor is measured before and after, in this very run."""
    count = setting.scaled(WINDOW_1_SENDS, 500)
    before = _floor(setting)
    with setting.server(system) as server, setting.crew(server) as crew:
        crew.wait([crew.start("bind", **setting.load(group="group-0"))])
        producer = crew.start("one_by_one", **setting.load(count=count))
        figures, _ = timed(server, crew, [producer], [], f"window 1, {system}")
        consumers = start_consumers(dataclasses.replace(setting, consumers=1), crew, 1, count)
        crew.wait(consumers)
        run = checked_run("window1", server, figures, consumers)
    after = _floor(setting)
    commit_ms, echo_ms = (statistics.mean(pair) for pair in zip(before, after, strict=True))
    latencies = _latencies(producer.result)
    run.figures |= latencies
    run.figures |= {"commit_p50_ms": commit_ms, "echo_p50_ms": echo_ms}
    run.figures["times_floor"] = latencies["p50_ms"] / (commit_ms + echo_ms)
    return run


def tasks(setting: Setting, system: str) -> Run:
    """256 tasks of one client that each await `send`."""
    count = setting.scaled(200_000, 20_000)
    with setting.server(system) as server, setting.crew(server) as crew:
        crew.wait([crew.start("bind", **setting.load(group="group-0"))])
        producer = crew.start("many_tasks", **setting.load(count=count, tasks=TASKS))
        figures, _ = timed(server, crew, [producer], [], f"256 tasks, {system}")
        consumers = start_consumers(dataclasses.replace(setting, consumers=1), crew, 1, count)
        crew.wait(consumers)
        return checked_run("tasks", server, figures, consumers)


def steady(setting: Setting, system: str, *, even: bool) -> Run:
    """5,000 messages a second, after as many ids as the broker remembers went through it.

    even: one message every 200 µs; otherwise as a loop's timer wakes the producer, about five every ms.
    """
    fill = setting.scaled(FILL, 20_000)
    count = STEADY_PER_SECOND * setting.scaled(10, 2)
    name = "steady even" if even else "steady ticks"
    with setting.server(system) as server, setting.crew(server) as crew:
        consumer = crew.start("consume", **setting.load(group="group-0", count=fill + count))
        filler = crew.start("produce", **setting.load(count=fill))
        filler.command("go")
        crew.wait([filler], f"fill, {system}")
        producer = crew.start("steady", **setting.load(first=fill, count=count, rate=STEADY_PER_SECOND, even=even))
        meter = Meter(server)
        producer.command("go")
        crew.wait([producer, consumer], f"{name}, {system}")
        assert producer.result is not None
        seconds = producer.result["ended"] - producer.result["began"]
        figures = {"rate_per_s": count / seconds, "messages": float(count), "seconds": seconds}
        figures |= _latencies(consumer.result) | meter.figures(count, seconds, [producer])
        figures["lateness_p99_ms"] = producer.result["lateness_ms"]["p99"]
        return checked_run(name, server, figures, [consumer])


def _latencies(result: dict[str, Any] | None) -> dict[str, float]:
    assert result is not None
    return {f"{name}_ms": value for name, value in result["latencies_ms"].items()}
