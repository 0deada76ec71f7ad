"""The broker's figures in the form that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from kiteq import __version__
from kiteq.pipe import reports

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["CONTENT_TYPE", "Figures", "read_figures", "render"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The oldest text format: every scraper reads it."""

COUNTERS: Final = {
    "accepted": ("messages_accepted", "Messages taken from producers and answered with a receipt."),
    "refused": ("messages_refused", "Messages refused: bad ones, and all while there is no room."),
    "duplicates": ("messages_duplicate", "Repeated sends that were answered and not stored again."),
    "unrouted": ("messages_unrouted", "Messages no group was bound to when they came."),
    "delivered": ("deliveries", "Messages handed to a connection, repeated attempts included."),
    "acked": ("deliveries_acked", "Deliveries that their group acked."),
    "failed": ("deliveries_failed", "Deliveries that failed: nacks, deadlines, lost connections."),
    "rejected": ("deliveries_rejected", "Deliveries a handler rejected for good."),
    "stale": ("deliveries_stale", "Acks and nacks that came too late and had no effect."),
    "dead": ("messages_dead", "Messages that became dead letters of a group."),
    "expired": ("messages_expired", "Messages whose time to live ended before a group acked them."),
    "damaged": ("messages_damaged", "Messages buried because their bytes are damaged."),
    "cancelled": ("messages_cancelled", "Delayed messages that were cancelled by hand."),
    "fly_dropped": ("fly_messages_dropped", "Fly messages dropped because nobody could take them."),
}
"""Counters of the core: name and help text of the metric, without prefix and `_total`."""

TRANSACTION_COUNTERS: Final = {
    "prepared": ("transactions_prepared", "Transactions that were stored to be decided later."),
    "checks_asked": ("transaction_checks", "Questions to producers what became of a transaction."),
    "conflicts": ("transaction_conflicts", "Decisions that contradicted an earlier one and were refused."),
    "unknown_transactions": ("transactions_unknown", "Decisions about transactions nobody knows."),
}
"""The same for transactions."""

LABELLED_COUNTERS: Final = (
    (
        "transaction_decisions",
        "decision",
        "Transactions that were decided.",
        {"commit": "committed", "rollback": "rolled_back"},
    ),
    (
        "transaction_check_answers",
        "answer",
        "What producers answered to those questions; none: they did not answer in time.",
        {
            "commit": "checks_commit",
            "rollback": "checks_rollback",
            "unknown": "checks_unknown",
            "running": "checks_running",
            "none": "checks_unanswered",
        },
    ),
)
"""Metric without prefix and `_total`, its label, help text, and by value of the label the counter of the core."""

OUTLET_GAUGES: Final = {
    "members": ("group_members", "Connections of the group."),
    "pending": ("group_pending_messages", "Messages that wait for the group or are in flight, without retrying ones."),
    "pending_bytes": ("group_pending_bytes", "Bytes of the pending messages."),
    "in_flight": ("group_in_flight_messages", "Messages handed out and not settled yet."),
    "retrying": ("group_retrying_messages", "Messages that failed and wait for another attempt."),
    "dead": ("group_dead_letters", "Dead letters that were not replayed or purged."),
}
"""Figures of a group in a topic: name and help text of the metric, without prefix."""


class Figures(NamedTuple):
    """What one scrape shows: as `reports.stat` and `reports.outlet_rows` return it."""

    stat: dict[str, Any]
    rows: list[dict[str, Any]]
    health: reports.Health
    connections_max: int


async def read_figures(core: Core) -> Figures:
    """Read the core once, on the loop; the store's size is asked in a thread."""
    stat = await reports.stat(core)
    return Figures(stat, await reports.outlet_rows(core), reports.health(core), core.settings.connections)


def render(figures: Figures) -> bytes:
    """Return the text of one scrape. It touches nothing of the core, so any thread may call it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_BrokerCollector(figures))
    return generate_latest(registry)


class _BrokerCollector(Collector):
    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        yield from self._broker()
        yield from self._counters()
        yield from self._outlets()
        yield from self._transactions()

    def _broker(self) -> Iterator[Metric]:
        stat, health = self._figures.stat, self._figures.health
        yield InfoMetricFamily(
            "kiteq_build", "Version and broker id.", {"version": __version__, "broker_id": str(stat["broker_id"])}
        )
        yield _gauge(
            "healthy", "1 while /healthz says ok, 0 when it is degraded or unavailable.", health.status == "ok"
        )
        yield _gauge(
            "publishing_refused", "1 while store or disk are too full to take messages.", bool(stat["refusing"])
        )
        yield _gauge("draining", "1 while the broker is shutting down.", stat["draining"])
        registry = stat["registry"]
        degraded = registry is not None and registry["degraded"]
        yield _gauge("registry_degraded", "1 while the registry is not as it should be.", degraded)
        yield _gauge("uptime_seconds", "Since the start of the broker.", stat["uptime_s"])
        yield _counter("starts", "How often this store was opened.", stat["epoch"])
        yield _gauge("connections", "Connections of clients.", stat["connections"])
        yield _gauge("connections_limit", "Most connections at a time.", self._figures.connections_max)
        yield _counter("commits", "Commits of the store since it was made.", stat["commits"])
        yield _gauge("store_used_bytes", "What the store uses.", stat["store_bytes"])
        yield _gauge("store_limit_bytes", "The most the store may use.", stat["store_limit"])
        yield _gauge("disk_free_bytes", "Free on the disk of the store.", stat["disk_free"])
        yield _gauge("unrouted_bytes", "Kept messages that no group was bound to.", stat["unrouted_bytes"])
        yield _gauge("delayed_messages", "Messages that wait for their time.", stat["delayed"]["messages"])
        yield _gauge("delayed_bytes", "Bytes of the delayed messages in the store.", stat["delayed"]["bytes"])
        yield _gauge("damaged_records", "Records with a bad checksum found since the start.", stat["damaged_records"])

    def _counters(self) -> Iterator[Metric]:
        counters = self._figures.stat["counters"]
        for name, (metric, text) in COUNTERS.items():
            yield _counter(metric, text, counters.get(name, 0))

    def _outlets(self) -> Iterator[Metric]:
        for name, (metric, text) in OUTLET_GAUGES.items():
            family = GaugeMetricFamily(f"kiteq_{metric}", text, labels=["group", "topic"])
            for row in self._figures.rows:
                family.add_metric([row["group"], row["topic"]], row[name])
            yield family

    def _transactions(self) -> Iterator[Metric]:
        figures, counters = self._figures.stat["transactions"], self._figures.stat["counters"]
        yield _gauge(
            "transactions_age_alarm", "1 while one is undecided for longer than half_age_alarm.", figures["alarm"]
        )
        for name, metric, text in (
            ("open", "open", "Transactions that are neither decided nor parked."),
            ("parked", "parked", "Transactions whose checks were answered with unknown too often."),
            ("oldest_age_s", "oldest_age_seconds", "Age of the oldest open or parked transaction; 0 without one."),
        ):
            family = GaugeMetricFamily(f"kiteq_transactions_{metric}", text, labels=["group"])
            for group, of_group in figures["groups"].items():
                family.add_metric([group], of_group[name] or 0)
            yield family
        for name, (metric, text) in TRANSACTION_COUNTERS.items():
            yield _counter(metric, text, counters.get(name, 0))
        for metric, label, text, names in LABELLED_COUNTERS:
            counter = CounterMetricFamily(f"kiteq_{metric}", text, labels=[label])
            for value, name in names.items():
                counter.add_metric([value], counters.get(name, 0))
            yield counter


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"kiteq_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"kiteq_{name}", text, value=value)
