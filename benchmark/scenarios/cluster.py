"""Several brokers: how many messages a second, and how soon they and their bindings are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from benchmark.harness.results import Run
from benchmark.harness.servers import KiteqServer, Target
from benchmark.harness.workers import Crew, Worker
from benchmark.load.statistics import percentiles
from benchmark.scenarios.setting import Setting
from benchmark.scenarios.throughput import end_to_end_through, publish_through

BROKERS: Final = (1, 2, 3)
WORKERS: Final = 2
ROUNDS: Final = 10
MEET_SECONDS_MAX: Final = 30.0
MEET_TASKS: Final = 16


def throughput(setting: Setting, system: str) -> list[Run]:
    """Publish and end to end, through one broker found in ZooKeeper, through several, and through `--workers`."""
    assert system == "kiteq"
    targets: dict[str, Callable[[], Target]] = {
        f"{count} broker{'s' * (count > 1)}": lambda count=count: setting.cluster(count)  # type: ignore[misc]
        for count in BROKERS
    }
    targets[f"{WORKERS} workers"] = lambda: setting.workers(WORKERS)
    runs = []
    for measure in (publish_through, end_to_end_through):
        some = [measure(setting, make(), f", {through}") for through, make in targets.items()]
        for run in some:
            run.figures["times_one_broker"] = run.figures["rate_per_s"] / some[0].figures["rate_per_s"]
        runs += some
    return runs


def discovery(setting: Setting, system: str) -> list[Run]:
    """A second broker, again and again, while clients run; then new bindings at one of two."""
    rounds = setting.scaled(ROUNDS, 2)
    with setting.cluster(1) as cluster, setting.crew(None) as crew:
        url = cluster.url
        clients = crew.start("meet", system=system, **setting.load(registry=url, tasks=MEET_TASKS))
        acked, delivered = [], []
        for number in range(rounds):
            with cluster.broker(f"joining-{number}") as broker:
                acked.append(_first(crew, clients, broker, "acked") - broker.serving_at)
                delivered.append(_first(crew, clients, broker, "delivered") - broker.serving_at)
        clients.command("stop")
        crew.wait([clients])
        assert clients.result is not None
        figures = _spread("first_ack", percentiles(acked), "_s") | _spread(
            "first_delivery", percentiles(delivered), "_s"
        )
        figures |= {"rounds": float(rounds), "errors": float(clients.result["errors"])}
    return [Run("discovery of a broker", system, figures), _of_bindings(setting, system, rounds)]


def _first(crew: Crew, worker: Worker, broker: KiteqServer, event: str) -> float:
    """Return when the clients met this broker."""

    def found() -> list[dict[str, Any]]:
        return [one for one in worker.events if one["event"] == event and one["broker"] == broker.broker_id]

    crew.wait_until(lambda: bool(found()), f"a first message {event} by the new broker", MEET_SECONDS_MAX)
    return float(found()[0]["at"])


def _of_bindings(setting: Setting, system: str, rounds: int) -> Run:
    with setting.cluster(2) as cluster, setting.crew(None) as crew:
        here, there = (broker.url for broker in cluster.brokers)
        result = crew.run("subscribe", system=system, **setting.load(registry=there, other=here, count=rounds))
        figures = _spread("confirmed", result["confirmed_ms"], "_ms") | _spread(
            "in_force", result["in_force_ms"], "_ms"
        )
        return Run("discovery of a binding", system, {**figures, "rounds": float(rounds)})


def _spread(name: str, found: dict[str, float], unit: str) -> dict[str, float]:
    return {f"{name}_p50{unit}": found["p50"], f"{name}_max{unit}": found["max"]}
