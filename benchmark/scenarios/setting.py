"""What one call of the benchmark was asked to do, and how it makes its servers."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.harness.clusters import Cluster, WorkersServer
from benchmark.harness.process import machine_busy_seconds
from benchmark.harness.results import Run
from benchmark.harness.servers import KiteqServer, RedisServer, Server, Target
from benchmark.harness.workers import Crew, Worker, compare

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Setting:
    """The options of the command line."""

    folder: Path
    messages: int = 1_000_000
    body_bytes: int = 128
    window: int = 1_000
    prefetch: int = 1_000
    groups: int = 1
    connections: int = 1
    consumers: int = 1
    flush: str = "sync"
    database: str | None = None
    systems: tuple[str, ...] = ("kiteq",)
    runs: int = 3
    loop: str = "trio"
    overlap: bool = False
    quick: bool = False
    topic: str = field(default="benchmark")

    def server(self, system: str) -> Server:
        """Return a new server, on a folder of its own; it is started by entering it."""
        folder = self.folder / f"{system}-{next(_numbers)}"
        if system == "redis":
            return RedisServer(folder)
        return KiteqServer(folder, database=self.database, flush=self.flush)

    def cluster(self, count: int) -> Cluster:
        """Return that many new brokers and their ZooKeeper."""
        return Cluster(self.folder / f"cluster-{next(_numbers)}", count, flush=self.flush)

    def workers(self, count: int) -> WorkersServer:
        """Return a new `kiteq --workers count`."""
        return WorkersServer(self.folder / f"workers-{next(_numbers)}", count, flush=self.flush)

    def crew(self, server: Target | None) -> Crew:
        return Crew(server, self.folder / f"crew-{next(_numbers)}", self.loop)

    def load(self, **fields: Any) -> dict[str, Any]:
        """Return the fields of a job that come from the command line; `fields` go first."""
        mine: dict[str, Any] = {
            "body_bytes": self.body_bytes,
            "window": self.window,
            "prefetch": self.prefetch,
            "topic": self.topic,
            "overlap": self.overlap,
        }
        return {**mine, **fields}

    def scaled(self, count: int, quick: int) -> int:
        """Return `count`, or `quick` with --quick."""
        return quick if self.quick else count


class Meter:
    """CPU of the broker and of everything else on the machine, over one timed section."""

    def __init__(self, server: Target) -> None:
        self._server = server
        self._restarts = server.restarts
        self._broker = server.cpu_seconds()
        self._machine = machine_busy_seconds()
        self._began = time.monotonic()

    def figures(self, messages: int, seconds: float, workers: list[Worker]) -> dict[str, float]:
        """Return microseconds of CPU per message by process, and what others used of one core, in percent."""
        broker = self._server.cpu_seconds() - self._broker
        machine = machine_busy_seconds() - self._machine
        producer = _cpu(workers, consuming=False)
        consumer = _cpu(workers, consuming=True)
        figures = {"rss_anon_mib": self._server.rss_anon_mib()}
        if self._server.restarts == self._restarts:
            figures["broker_cpu_us"] = broker / messages * 1e6
            figures["broker_core_percent"] = broker / seconds * 100
            others = max(0.0, machine - broker - producer - consumer)
            figures["other_core_percent"] = others / (time.monotonic() - self._began) * 100
        if producer:
            figures["producer_cpu_us"] = producer / messages * 1e6
        if consumer:
            figures["consumer_cpu_us"] = consumer / messages * 1e6
        return figures


def _cpu(workers: list[Worker], *, consuming: bool) -> float:
    chosen = [worker.result for worker in workers if (worker.job.role == "consume") is consuming]
    return sum(float(result["cpu"]) for result in chosen if result is not None and "cpu" in result)


def checked_run(scenario: str, server: Target, figures: dict[str, float], consumers: list[Worker]) -> Run:
    """Return the run, with the numbers sent compared with the numbers received."""
    found = compare(consumers)
    notes = []
    if found.strangers:
        notes.append(f"{found.strangers} messages of nobody")
    if server.restarts:
        notes.append(f"broker killed and restarted {server.restarts}x")
    return Run(scenario, server.system, figures, found.lost, found.duplicates, bool(consumers), "; ".join(notes))
