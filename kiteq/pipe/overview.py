"""What one broker does at the moment, in one answer that fits a frame however many topics and groups there are."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final

import trio

from kiteq import __version__
from kiteq.pipe.reports import ROWS_PER_SLICE, health, stat
from kiteq.remoting.packets import WIRE_VERSION
from kiteq.store import records
from kiteq.store.tables import SEQUENCE_KEY

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.store.state import TopicLog
    from kiteq.store.store import Store

__all__ = ["Overview", "identity"]

ROWS_MAX: Final = 1_000
"""Topics, and groups, of one answer: with the longest names they fit a frame of the smallest size."""
OLDEST_BYTES_MAX: Final = 16 << 20
"""Read for one answer to find how old the oldest messages are; what was found is remembered."""

SUMS: Final = ("pending", "pending_bytes", "retrying", "dead")

Row = dict[str, Any]


def identity(core: Core) -> Row:
    """Return who this broker is, how it is and what it serves; no topics means every name."""
    told = health(core)
    return {
        "broker_id": core.store.broker_id,
        "version": __version__,
        "wire_version": WIRE_VERSION,
        "epoch": core.store.epoch,
        "uptime_s": int(core.clock.monotonic() - core.started_at),
        "state": "draining" if core.draining else told.status,
        "reasons": told.reasons,
        "topics": list(core.settings.topics),
    }


class Overview:
    """Makes the answers; it remembers how old the oldest messages were, which are read from the disk."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._oldest: dict[int, tuple[int, int]] = {}
        """By number of the topic: first sequence of its oldest record, and when that was accepted."""

    async def read(self) -> Row:
        """Return the figures of the broker, and those of the topics and groups with most waiting.

        `in` and `out` are counts since the start, of messages that became deliverable and that were acked;
        `at_s` is the moment on a clock that only goes on, so that two answers give rates.
        """
        core = self._core
        told = await stat(core)
        at_s = core.clock.monotonic()
        topics, groups = await self._tallies()
        transactions = told["transactions"]
        row = identity(core) | {
            "at_s": at_s,
            "connections": told["connections"],
            "connections_limit": core.settings.connections,
            "store_bytes": told["store_bytes"],
            "store_limit": told["store_limit"],
            "disk_free": told["disk_free"],
            "unrouted_bytes": told["unrouted_bytes"],
            "registry": told["registry"],
            "accepted": core.counters["accepted"],
            "delivered": core.counters["delivered"],
            "acked": core.counters["acked"],
            "pending": sum(row["pending"] for row in groups),
            "retrying": sum(row["retrying"] for row in groups),
            "dead": sum(row["dead"] for row in groups),
            "delayed": told["delayed"]["messages"],
            "transactions": {name: transactions[name] for name in ("open", "parked", "oldest_age_s")},
            "topic_count": len(topics),
            "group_count": len(groups),
        }
        row["topic_rows"], row["group_rows"] = _most(topics, "in"), _most(groups, "out")
        ages = await self._ages([one["topic"] for one in row["topic_rows"]])
        for one in row["topic_rows"]:
            one["oldest_age_s"] = ages.get(one["topic"])
        return row

    async def _tallies(self) -> tuple[list[Row], list[Row]]:
        """Return a row for each topic and each group that is bound; others have their turn between."""
        core = self._core
        topics: dict[str, Row] = {
            name: {"topic": name, "in": topic.next_sequence, "out": 0, "groups": 0} | dict.fromkeys(SUMS, 0)
            for name, topic in core.store.topics.items()
        }
        groups: list[Row] = []
        seen = 0
        for group in list(core.deliveries.groups.values()):
            outlets = list(group.outlets.values())
            if not outlets:
                continue
            row: Row = {"group": group.name, "connections": len(group.members), "topics": len(outlets)}
            row |= {"in_flight": 0, "out": 0} | dict.fromkeys(SUMS, 0)
            groups.append(row)
            for outlet in outlets:
                subscription = outlet.subscription
                row["in_flight"] += outlet.leased
                topic = topics.get(subscription.topic.name)
                if topic is not None:  # else it is new at this moment
                    topic["groups"] += 1
                for one in (row,) if topic is None else (row, topic):
                    one["out"] += outlet.acked
                    one["pending"] += subscription.pending
                    one["pending_bytes"] += subscription.pending_bytes
                    one["retrying"] += subscription.retrying
                    one["dead"] += subscription.dead
            seen += len(outlets)
            if seen >= ROWS_PER_SLICE:
                seen = 0
                await trio.lowlevel.checkpoint()
        return list(topics.values()), groups

    async def _ages(self, names: list[str]) -> dict[str, int]:
        """Return how many seconds ago the oldest message of each topic was accepted that some group is owed."""
        core = self._core
        wanted: dict[str, tuple[TopicLog, int]] = {}
        for name in names:
            topic = core.store.topics[name]
            entry = next(topic.index.entries(), None)
            if entry is not None:
                wanted[name] = (topic, entry.first)
        unknown = [(topic, first) for topic, first in wanted.values() if self._known(topic, first) is None]
        if unknown:
            self._oldest |= await trio.to_thread.run_sync(_read_accepted, core.store, unknown)
        now_ms = core.clock.epoch_ms()
        return {
            name: max(0, now_ms - accepted_ms) // 1000
            for name, (topic, first) in wanted.items()
            if (accepted_ms := self._known(topic, first)) is not None
        }

    def _known(self, topic: TopicLog, first: int) -> int | None:
        found = self._oldest.get(topic.number)
        return found[1] if found is not None and found[0] == first else None


def _most(rows: list[Row], activity: str) -> list[Row]:
    """Return the rows with most waiting, the busier ones first among equals."""
    return heapq.nlargest(ROWS_MAX, rows, key=lambda row: (row["pending"] + row["retrying"], row[activity]))


def _read_accepted(store: Store, wanted: list[tuple[TopicLog, int]]) -> dict[int, tuple[int, int]]:
    """Return when the records that start there were accepted, as far as the disk is read for it."""
    found: dict[int, tuple[int, int]] = {}
    size = 0
    for topic, first in wanted:
        raw = store.read_raw(topic, first)
        if raw is None:
            continue  # settled meanwhile
        try:
            head = records.parse_head(SEQUENCE_KEY.pack(topic.number, first), raw)
        except records.DamagedRecord:
            continue
        found[topic.number] = (first, head.accepted_ms)
        size += len(raw)
        if size > OLDEST_BYTES_MAX:
            break
    return found
