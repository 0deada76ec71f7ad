"""Publishing, end to end, and fan-out: how many messages a second, at what cost."""

from __future__ import annotations

from benchmark.harness.results import Run
from benchmark.harness.servers import Target
from benchmark.harness.workers import Crew, Worker
from benchmark.scenarios.setting import Meter, Setting, checked_run


def publish(setting: Setting, system: str) -> Run:
    return publish_through(setting, setting.server(system))


def publish_through(setting: Setting, target: Target, through: str = "") -> Run:
    """Pipelined durable sends. One group is bound, and absent: each message is stored and owed to it.

    Afterwards the group comes and takes everything, untimed, so that every number is compared.
    """
    with target, setting.crew(target) as crew:
        crew.wait([crew.start("bind", **setting.load(group="group-0"))])
        producers = start_producers(setting, crew)
        figures, _ = timed(target, crew, producers, [], f"publish{through}, {target.system}")
        figures |= target.own_figures()
        consumers = start_consumers(setting, crew, 1)
        crew.wait(consumers)
        return checked_run(f"publish {setting.body_bytes} B{through}", target, figures, consumers)


def end_to_end(setting: Setting, system: str) -> Run:
    return end_to_end_through(setting, setting.server(system))


def end_to_end_through(setting: Setting, target: Target, through: str = "") -> Run:
    """Producers, the broker, and the consumers of `groups` groups at the same time."""
    name = "e2e" if setting.groups == 1 else "fanout"
    with target, setting.crew(target) as crew:
        consumers = start_consumers(setting, crew, setting.groups)
        producers = start_producers(setting, crew)
        figures, _ = timed(target, crew, producers, consumers, f"{name}{through}, {target.system}")
        figures |= target.own_figures()
        return checked_run(f"{name} {setting.body_bytes} B{through}", target, figures, consumers)


def start_producers(setting: Setting, crew: Crew, first: int = 0, count: int | None = None) -> list[Worker]:
    """Start the producers of `count` numbers from `first`, divided among the connections."""
    count = setting.messages if count is None else count
    share, rest = divmod(count, setting.connections)
    workers = []
    for index in range(setting.connections):
        mine = share + (index < rest)
        workers.append(crew.start("produce", **setting.load(first=first, count=mine)))
        first += mine
    return workers


def start_consumers(setting: Setting, crew: Crew, groups: int, count: int | None = None) -> list[Worker]:
    count = setting.messages if count is None else count
    return [
        crew.start("consume", **setting.load(group=f"group-{group}", count=count, alone=setting.consumers == 1))
        for group in range(groups)
        for _ in range(setting.consumers)
    ]


def timed(
    server: Target, crew: Crew, producers: list[Worker], consumers: list[Worker], label: str
) -> tuple[dict[str, float], float]:
    """Let all go; return the figures and the seconds from the first send to the last answer or settled ack."""
    workers = producers + consumers
    meter = Meter(server)
    for worker in producers:
        worker.command("go")
    crew.wait(workers, label)
    results = [worker.result for worker in workers if worker.result is not None]
    began = min(worker.result["began"] for worker in producers if worker.result is not None)
    seconds = max(result["ended"] for result in results) - began
    messages = sum(worker.job.count for worker in producers)
    works = messages * len({worker.job.group for worker in consumers}) if consumers else messages
    figures = {"rate_per_s": works / seconds, "messages": float(messages), "seconds": seconds}
    figures |= meter.figures(messages, seconds, workers)
    if retries := sum(result.get("retries", 0) for result in results):
        figures["retries"] = float(retries)
    return figures, seconds
