"""One of two brokers dies or is drained while a producer runs: what its calls see, and whether anything is lost."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from benchmark.harness.clusters import Cluster, accepted
from benchmark.harness.results import Run
from benchmark.harness.servers import BenchmarkError, KiteqServer
from benchmark.harness.workers import Crew, Worker
from benchmark.load.cluster_load import NOT_ANSWERED
from benchmark.scenarios.setting import Setting

TASKS: Final = 64
RATE_PER_SECOND: Final = 1_000
BEFORE_SECONDS: Final = 3.0
AFTER_SECONDS: Final = 10.0
AFTER_SECONDS_QUICK: Final = 6.0
"""Longer than the client's time-out of 5 s: every call under way at the fault has ended by then."""
WINDOW_SECONDS: Final = 1.0
"""Rates are of this long before and after the fault."""
QUIET_SECONDS: Final = 2.0
"""Nothing more comes to a consumer that got nothing for this long."""
CONSUME_SECONDS_MAX: Final = 120.0

Fault = Literal["kill -9", "kill -9 and restart", "drain"]
FAULTS: Final[tuple[Fault, ...]] = ("kill -9", "kill -9 and restart", "drain")
LOADS: Final = {f"{TASKS} tasks": 0, f"{RATE_PER_SECOND:,}/s": RATE_PER_SECOND}


def failover(setting: Setting, system: str) -> list[Run]:
    """Every fault under every load."""
    return [_run(setting, system, load, fault) for load in LOADS for fault in FAULTS]


def _run(setting: Setting, system: str, load: str, fault: Fault) -> Run:
    """The group is bound and absent; it comes when the broker is back, and takes what both have."""
    after_s = AFTER_SECONDS_QUICK if setting.quick else AFTER_SECONDS
    fields = {**setting.load(), "system": system}
    with setting.cluster(2) as cluster, setting.crew(None) as crew:
        fields["registry"] = cluster.url
        crew.wait([crew.start("bind", **fields, group="group-0")])
        producer = crew.start("call", **fields, tasks=TASKS, rate=LOADS[load])
        producer.command("go")
        time.sleep(BEFORE_SECONDS)
        victim = _busiest(cluster)
        at = _strike(victim, fault)
        time.sleep(max(0.0, at + after_s - time.monotonic()))
        producer.command("stop")
        crew.wait([producer])
        calls = Calls.of(producer)
        figures = calls.figures(victim.broker_id, at)
        if fault == "kill -9 and restart":
            figures["serving_s"] = victim.start_seconds
        if not victim.alive():
            victim.restart()
        seen = _consume(crew, calls, fields)
    lost = int(((seen == 0) & calls.answered).sum())
    return Run(f"{load}, {fault}", system, figures, lost, int(np.clip(seen - 1, 0, None).sum()), checked=True)


def _busiest(cluster: Cluster) -> KiteqServer:
    counts = accepted(cluster.url)
    return max(cluster.brokers, key=lambda broker: counts[broker.broker_id])


def _strike(victim: KiteqServer, fault: Fault) -> float:
    """Return when the broker began to drain, or was dead."""
    began = time.monotonic()
    if fault == "drain":
        victim.stop()
        return began
    victim.stop(signal.SIGKILL)
    dead = time.monotonic()
    if fault == "kill -9 and restart":
        victim.restart()
    return dead


@dataclass(frozen=True)
class Calls:
    """Each call: when it began and ended, and the place in `brokers` of the one that answered."""

    began: npt.NDArray[np.float64]
    ended: npt.NDArray[np.float64]
    answered_by: npt.NDArray[np.uint8]
    brokers: list[str]
    errors: dict[str, int]

    @classmethod
    def of(cls, worker: Worker) -> Self:
        assert worker.result is not None
        written = Path(worker.result["calls"]).read_bytes()
        count = len(written) // 17
        began, ended = np.frombuffer(written, np.float64, 2 * count).reshape(2, count)
        answered_by = np.frombuffer(written, np.uint8, offset=16 * count)
        return cls(began, ended, answered_by, worker.result["brokers"], worker.result["errors"])

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        return np.not_equal(self.answered_by, NOT_ANSWERED)

    def figures(self, broker_id: str, at: float) -> dict[str, float]:
        """Return what the calls saw of a fault of this broker at that time."""
        answers = np.sort(self.ended[self.answered])
        around = answers[answers > at - WINDOW_SECONDS]
        durations = (self.ended - self.began)[self.answered]
        under_way = (self.began < at) & (self.ended > at)
        answered_there = self.answered_by == self.brokers.index(broker_id)
        return {
            "rate_per_s": _between(answers, at - WINDOW_SECONDS, at),
            "rate_after_per_s": _between(answers, at, at + WINDOW_SECONDS),
            "share_before": float(answered_there[self.ended < at].mean()),
            "gap_s": float(np.diff(around, append=self.ended.max()).max()),
            "slowest_s": float(durations.max()),
            "under_way": float((under_way & (answered_there | ~self.answered)).sum()),
            "under_way_answered": float((under_way & answered_there).sum()),
            "timed_out": float(self.errors.get("SendTimeout", 0)),
            "errors": float(sum(self.errors.values())),
        }


def _between(moments: npt.NDArray[np.float64], since: float, until: float) -> float:
    return float(((moments > since) & (moments <= until)).sum()) / (until - since)


def _consume(crew: Crew, calls: Calls, fields: dict[str, Any]) -> npt.NDArray[np.int64]:
    """Return how often the number of each call is delivered. What was not answered may be, or may not."""
    consumer = crew.start("consume", **fields, group="group-0", count=len(calls.began), alone=False)
    moved = (0, time.monotonic())

    def is_quiet() -> bool:
        nonlocal moved
        if consumer.progress != moved[0]:
            moved = (consumer.progress, time.monotonic())
        return consumer.progress > 0 and time.monotonic() - moved[1] > QUIET_SECONDS

    crew.wait_until(is_quiet, "every message delivered", CONSUME_SECONDS_MAX)
    consumer.command("stop")
    crew.wait_until(lambda: consumer.done, "the consumer's end")
    assert consumer.result is not None
    if consumer.result["strangers"]:
        raise BenchmarkError(f"{consumer.result['strangers']} messages of nobody were delivered")
    return np.frombuffer(Path(consumer.result["seen"]).read_bytes(), np.uint8).astype(np.int64)
