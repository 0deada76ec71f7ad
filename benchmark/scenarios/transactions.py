"""Two-phase messages: what one costs beside a plain send, how soon it is delivered, how many may be open."""

from __future__ import annotations

import dataclasses
import signal
from typing import Final

from benchmark.harness.results import Run
from benchmark.scenarios.latency import TASKS
from benchmark.scenarios.setting import Meter, Setting, checked_run
from benchmark.scenarios.throughput import start_consumers, timed

FRAMES: Final = 400_000
TASK_TRANSACTIONS: Final = 100_000
STEADY_PER_SECOND: Final = 500
OPEN: Final = 1_000_000


def cost(setting: Setting, system: str) -> list[Run]:
    """Whole frames from a bare socket: plain durable sends, then half message and commit, on one broker."""
    return _pair(setting, system, "frames", ("frames_publish", "frames_transact"), FRAMES, system_of_load="frames")


def cost_tasks(setting: Setting, system: str) -> list[Run]:
    """256 tasks of one client: each awaits `send`, then each runs `async with client.transaction(...)`."""
    return _pair(setting, system, "tasks", ("many_tasks", "transact_tasks"), TASK_TRANSACTIONS, tasks=TASKS)


def _pair(
    setting: Setting, system: str, name: str, roles: tuple[str, str], full: int, *, tasks: int = 1,
    system_of_load: str | None = None,
) -> list[Run]:  # fmt: skip
    count = setting.scaled(full, 20_000)
    pair: list[dict[str, float]] = []
    with setting.server(system) as server, setting.crew(server) as crew:
        crew.wait([crew.start("bind", **setting.load(group="group-0"))])
        # Twice, and the first time is not counted: the second begins with the caches as the first left them.
        for index in range(2):
            pair.clear()
            for half, role in enumerate(roles):
                first = (2 * index + half) * count
                producer = crew.start(
                    role, system=system_of_load, **setting.load(first=first, count=count, tasks=tasks)
                )
                pair.append(timed(server, crew, [producer], [], f"{role}, {system}")[0])
        consumers = start_consumers(dataclasses.replace(setting, consumers=1), crew, 1, 4 * count)
        crew.wait(consumers)
        plain, transactions = pair
        transactions["times_plain"] = plain["rate_per_s"] / transactions["rate_per_s"]
        transactions["times_plain_cpu"] = transactions["broker_cpu_us"] / plain["broker_cpu_us"]
        return [Run(f"tx {name}, plain", system, plain), checked_run(f"tx {name}", server, transactions, consumers)]


def steady(setting: Setting, system: str) -> Run:
    """500 transactions a second: from the commit to the consumer's handler."""
    count = STEADY_PER_SECOND * setting.scaled(10, 2)
    with setting.server(system) as server, setting.crew(server) as crew:
        producer = crew.start("transact_steady", **setting.load(count=count, rate=STEADY_PER_SECOND))
        meter = Meter(server)
        producer.command("go")
        crew.wait([producer], f"tx steady, {system}")
        assert producer.result is not None
        seconds = producer.result["ended"] - producer.result["began"]
        figures = {"rate_per_s": count / seconds, "messages": float(count), "seconds": seconds}
        figures |= {f"{name}_ms": value for name, value in producer.result["latencies_ms"].items()}
        figures |= meter.figures(count, seconds, [producer])
        figures["lateness_p99_ms"] = producer.result["lateness_ms"]["p99"]
        return Run("tx steady", system, figures)


def open_halves(setting: Setting, system: str) -> Run:
    """A million open transactions: what each costs in memory, and a start with all of them after kill -9."""
    count = setting.scaled(OPEN, 50_000)
    with setting.server(system) as server, setting.crew(server) as crew:
        before_mib = server.rss_anon_mib()
        producer = crew.start("frames_prepare", system="frames", **setting.load(count=count))
        figures, _ = timed(server, crew, [producer], [], f"tx open, {system}")
        figures["rss_anon_mib"] = server.rss_anon_mib()
        figures["bytes_each"] = (figures["rss_anon_mib"] - before_mib) * 2**20 / count
        server.stop(signal.SIGKILL)
        figures["serving_s"] = server.restart()
        figures["restarted_bytes_each"] = (server.rss_anon_mib() - before_mib) * 2**20 / count
        return Run("tx open", system, figures)
