"""A deep backlog, a restart, a kill in mid-load, and doing nothing."""

from __future__ import annotations

import dataclasses
import signal
import time
from typing import Final

from benchmark.harness.results import Run
from benchmark.scenarios.setting import Meter, Setting, checked_run
from benchmark.scenarios.throughput import start_consumers, start_producers, timed

BACKLOG: Final = 5_000_000
STORED: Final = 1_000_000
FIFTHS: Final = 5
IDLE_SECONDS: Final = 5.0
SETTLE_SECONDS: Final = 1.0


def backlog(setting: Setting, system: str) -> list[Run]:
    """Publish to an absent group, in fifths; then the group comes and takes everything."""
    fifth = setting.scaled(BACKLOG, 200_000) // FIFTHS
    with setting.server(system) as server, setting.crew(server) as crew:
        crew.wait([crew.start("bind", **setting.load(group="group-0"))])
        parts = []
        for index in range(FIFTHS):
            producers = start_producers(setting, crew, index * fifth, fifth)
            parts.append(timed(server, crew, producers, [], f"backlog, fifth {index + 1}, {system}")[0])
        publishing = {
            "rate_per_s": fifth * FIFTHS / sum(part["seconds"] for part in parts),
            "messages": float(fifth * FIFTHS),
            "rss_anon_mib": server.rss_anon_mib(),
        }
        if all("broker_cpu_us" in part for part in parts):
            costs = [part["broker_cpu_us"] for part in parts]
            publishing |= {f"fifth_{index + 1}_cpu_us": cost for index, cost in enumerate(costs)}
            publishing["broker_cpu_us"] = sum(costs) / FIFTHS
            publishing["worst_to_first_fifth"] = max(costs[1:]) / costs[0]
        meter = Meter(server)
        consumers = start_consumers(setting, crew, 1, fifth * FIFTHS)
        crew.wait(consumers, f"backlog, drain, {system}")
        results = [worker.result for worker in consumers if worker.result is not None]
        seconds = max(result["ended"] for result in results) - min(result["began"] for result in results)
        draining = {"rate_per_s": fifth * FIFTHS / seconds, "messages": float(fifth * FIFTHS), "seconds": seconds}
        draining |= meter.figures(fifth * FIFTHS, seconds, consumers)
        drained = checked_run("backlog drain", server, draining, consumers)
    return [Run("backlog publish", system, publishing), drained]


def restart(setting: Setting, system: str) -> Run:
    """With a million stored: the time from starting the process to its first answer, after kill -9."""
    count = setting.scaled(STORED, 100_000)
    with setting.server(system) as server, setting.crew(server) as crew:
        crew.wait([crew.start("bind", **setting.load(group="group-0"))])
        timed(server, crew, start_producers(setting, crew, 0, count), [], f"store, {system}")
        server.stop(signal.SIGKILL)
        figures = {"serving_s": server.restart(), "messages": float(count), "rss_anon_mib": server.rss_anon_mib()}
        server.stop()
        figures["serving_after_stop_s"] = server.restart()
        consumers = start_consumers(dataclasses.replace(setting, consumers=1), crew, 1, count)
        crew.wait(consumers)
        return checked_run("restart", server, figures, consumers)


def crash(setting: Setting, system: str) -> Run:
    """End to end, and kill -9 of the broker when a third is sent: nothing acked may be missing."""
    count = setting.scaled(500_000, 50_000)
    with setting.server(system) as server, setting.crew(server) as crew:
        consumers = start_consumers(dataclasses.replace(setting, consumers=1), crew, setting.groups, count)
        producers = start_producers(setting, crew, 0, count)
        meter = Meter(server)
        for worker in producers:
            worker.command("go")
        while sum(worker.progress for worker in producers) < count // 3 and not all(w.done for w in producers):
            time.sleep(0.01)
        server.stop(signal.SIGKILL)
        crew.wait(producers + consumers, f"crash, {system}")
        results = [worker.result for worker in producers + consumers if worker.result is not None]
        seconds = max(result["ended"] for result in results) - min(result["began"] for result in results)
        figures = {"messages": float(count), "seconds": seconds, "serving_s": server.start_seconds}
        figures |= meter.figures(count, seconds, producers + consumers)
        figures["retries"] = float(sum(result.get("retries", 0) for result in results))
        return checked_run("crash", server, figures, consumers)


def idle(setting: Setting, system: str) -> Run:
    """A broker just started, with nobody connected."""
    with setting.server(system) as server:
        time.sleep(SETTLE_SECONDS)
        before = server.cpu_seconds()
        time.sleep(IDLE_SECONDS)
        percent = (server.cpu_seconds() - before) / IDLE_SECONDS * 100
        return Run("idle", system, {"rss_anon_mib": server.rss_anon_mib(), "broker_core_percent": percent})
