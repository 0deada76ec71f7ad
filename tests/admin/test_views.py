"""What the HTTP port tells of a real broker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from kiteq import __version__, checking
from kiteq.binding.bindings import direct, fanout, regex
from kiteq.errors import StoreFailed
from kiteq.message import Message
from kiteq.pipe import reports
from kiteq.remoting.packets import DECISION_RUNNING, DECISION_UNKNOWN, Ask
from kiteq.store.tables import Usage
from tests.admin.http import Answer, get, serving
from tests.e2e.wire import PATIENCE_SECONDS, JumpingClock, connect, numbered


async def wait_answer(address: str, path: str, wanted: Callable[[Answer], bool]) -> Answer:
    with trio.fail_after(PATIENCE_SECONDS):
        while not wanted(answer := await get(address, path)):  # noqa: ASYNC110 of the broker
            await trio.sleep(0.05)
    return answer


async def scrape(address: str) -> dict[str, Metric]:
    answer = await get(address, "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {metric.name: metric for metric in text_string_to_metric_families(answer.body.decode())}


def value(metric: Metric, **labels: str) -> float:
    return next(sample.value for sample in metric.samples if sample.labels == labels)


async def test_stat_is_what_the_administrative_request_answers(tmp_path: Path) -> None:
    async with serving(tmp_path / "db") as (broker, address):
        client = await connect(broker, "p")
        await client.publish(numbered(3))
        answer = await get(address, "/stat")
        told = await client.admin("stat")
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json["counters"]["accepted"] == 3
    assert answer.json["broker_id"] == told["broker_id"]
    assert answer.json.keys() == told.keys()


async def test_binds_lists_every_binding_by_topic_and_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "ROWS_PER_SLICE", 2)
    async with serving(tmp_path / "db") as (broker, address):
        assert (await get(address, "/binds")).json == {}
        await connect(broker, "g", direct("t", "a", watermark=10), regex("t", "b.*", watermark=10))
        await connect(broker, "h", fanout("t", persistent=False), fanout("u", persistent=False))
        told = (await get(address, "/binds")).json
    every = {"kind": "fanout", "pattern": "*", "watermark": None, "persistent": False}
    assert told["u"] == {"h": [every]}
    assert told["t"]["h"] == [every]
    assert told["t"]["g"] == [
        {"kind": "direct", "pattern": "a", "watermark": 10, "persistent": True},
        {"kind": "regex", "pattern": "b.*", "watermark": 10, "persistent": True},
    ]


async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    async with serving(tmp_path / "db", half_age_alarm=5.0) as (broker, address):
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", direct("t", "a"), window=2)
        await producer.publish([*numbered(3), Message("t", "nobodys", b"x")])
        acked, failed = await consumer.take(2)
        await consumer.nack([failed], after_ms=60_000)
        await consumer.credit(0)
        await consumer.ack([acked])
        metrics = await scrape(address)
        told = await producer.admin("stat")
    assert all(name.startswith("kiteq_") for name in metrics)
    assert all(metric.documentation for metric in metrics.values())
    where = {"group": "g", "topic": "t"}
    assert value(metrics["kiteq_messages_accepted"]) == 4
    assert value(metrics["kiteq_messages_unrouted"]) == 1
    assert value(metrics["kiteq_deliveries_acked"]) == 1
    assert value(metrics["kiteq_deliveries_failed"]) == 1
    assert value(metrics["kiteq_messages_dead"]) == 0
    assert value(metrics["kiteq_connections"]) == 2
    assert value(metrics["kiteq_healthy"]) == 1
    assert value(metrics["kiteq_store_limit_bytes"]) == told["store_limit"]
    assert value(metrics["kiteq_unrouted_bytes"]) == told["unrouted_bytes"] > 0
    assert value(metrics["kiteq_group_retrying_messages"], **where) == 1
    assert value(metrics["kiteq_group_pending_messages"], **where) == 1
    assert value(metrics["kiteq_group_pending_bytes"], **where) == len(numbered(1)[0].encoded())
    assert value(metrics["kiteq_group_members"], **where) == 1
    assert value(metrics["kiteq_build_info"], version=__version__, broker_id=told["broker_id"]) == 1


async def test_a_name_cannot_break_the_lines_of_the_metrics(tmp_path: Path) -> None:
    async with serving(tmp_path / "db") as (broker, address):
        # Names that clients may choose hold neither quotes nor line ends; a store of another version may.
        await connect(broker, "g", fanout("t"))
        (outlet,) = broker.core.router.outlets()
        outlet.subscription.group = 'a"b\\c\nd'
        metrics = await scrape(address)
    assert value(metrics["kiteq_group_members"], group='a"b\\c\nd', topic="t") == 1


async def test_health_is_ok_at_first(tmp_path: Path) -> None:
    async with serving(tmp_path / "db") as (_, address):
        answer = await get(address, "/healthz")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


async def test_health_names_what_is_refused_and_recovers(tmp_path: Path) -> None:
    async with serving(tmp_path / "db", group_quota=100_000) as (broker, address):
        producer = await connect(broker, "p")
        slow = await connect(broker, "slow", fanout("t"))
        await producer.publish([Message("t", "a", b"x" * 30_000) for _ in range(4)])
        answer = await wait_answer(address, "/healthz", lambda one: one.json["status"] == "degraded")
        assert answer.status == 200
        assert answer.json["reasons"] == ["1 topics are refused because groups keep too much: slow"]
        assert value((await scrape(address))["kiteq_healthy"]) == 0
        await slow.credit(100)
        await slow.ack(await slow.take(4))
        await wait_answer(address, "/healthz", lambda one: one.json["status"] == "ok")


async def test_a_full_disk_is_degraded_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving("memory://") as (broker, address):
        monkeypatch.setattr(broker.core.store, "usage", lambda: Usage(0, 1 << 40, disk_free=1, disk_size=1 << 40))
        answer = await wait_answer(address, "/healthz", lambda one: bool(one.json["status"] == "degraded"))
        assert answer.json["reasons"][0].startswith("publishing is refused: the disk has 1 bytes free, ")
        assert value((await scrape(address))["kiteq_publishing_refused"]) == 1
        assert value((await scrape(address))["kiteq_disk_free_bytes"]) == 1


async def test_a_store_that_fills_up_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving("memory://") as (broker, address):
        monkeypatch.setattr(broker.core.store, "usage", lambda: Usage(75, 100, disk_free=1 << 40, disk_size=1 << 40))
        answer = await wait_answer(address, "/healthz", lambda one: one.json != {"status": "ok"})
    assert (answer.status, answer.json) == (200, {"status": "degraded", "reasons": ["the store fills up"]})


async def test_draining_is_unavailable_and_the_port_ends_with_the_broker(tmp_path: Path) -> None:
    async with serving(tmp_path / "db") as (broker, address):
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", direct("t", "a"), window=1)
        await producer.publish(numbered(1))
        held = await consumer.take(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.drain)
            answer = await wait_answer(address, "/healthz", lambda one: one.status == 503)
            assert answer.json == {"status": "unavailable", "reasons": ["the broker is shutting down"]}
            assert value((await scrape(address))["kiteq_draining"]) == 1
            await consumer.ack(held)


async def test_a_failed_store_is_unavailable(tmp_path: Path) -> None:
    async with serving(tmp_path / "db") as (broker, address):
        # The broker ends in the same moment, so that no request comes between; here nobody is told.
        broker.core.store.failure = StoreFailed("writing to the store failed")
        answer = await get(address, "/healthz")
        broker.core.store.failure = None
    assert answer.status == 503
    assert answer.json == {"status": "unavailable", "reasons": ["writing to the store failed"]}


@pytest.mark.parametrize("path", ["/", "/stat/", "/nothing", "/metrics/x", "/%00"])
async def test_another_path_is_not_found(tmp_path: Path, path: str) -> None:
    async with serving("memory://") as (_, address):
        answer = await get(address, path)
    assert (answer.status, answer.json) == (404, {"error": "Not Found"})


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
async def test_nothing_can_be_changed(method: str) -> None:
    async with serving("memory://") as (_, address):
        answer = await get(address, "/stat", method=method)
    assert (answer.status, set(answer.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})


async def test_a_head_request_has_no_body() -> None:
    async with serving("memory://") as (_, address):
        answer = await get(address, "/stat", method="HEAD")
    assert (answer.status, answer.body) == (200, b"")


async def test_transactions_are_counted_and_an_old_one_is_an_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "FIGURES_SECONDS", 0.02)
    clock = JumpingClock()
    async with serving(tmp_path / "db", clock, half_age_alarm=100.0, check_after=3_600.0) as (broker, address):
        owner = await connect(broker, "orders", topics=["t"])
        messages = numbered(5)
        await owner.prepare(messages)
        await owner.commit(messages[0].id, messages[1].id)
        await owner.roll_back(messages[2].id)
        assert (await owner.commit(messages[2].id))[0][1] == "transaction_conflict"
        assert (await owner.commit(b"?" * 16))[0][1] == "unknown_transaction"
        assert (await get(address, "/healthz")).json == {"status": "ok"}
        clock.advance(101)
        answer = await wait_answer(address, "/healthz", lambda one: one.json != {"status": "ok"})
        metrics = await scrape(address)
        told = (await get(address, "/stat")).json["transactions"]
        await owner.roll_back(messages[3].id, messages[4].id)
        assert (await get(address, "/healthz")).json == {"status": "ok"}
    assert value(metrics["kiteq_transactions_open"], group="orders") == 2
    assert value(metrics["kiteq_transactions_parked"], group="orders") == 0
    assert value(metrics["kiteq_transactions_prepared"]) == 5
    assert value(metrics["kiteq_transaction_decisions"], decision="commit") == 2
    assert value(metrics["kiteq_transaction_decisions"], decision="rollback") == 1
    assert value(metrics["kiteq_transaction_conflicts"]) == 1
    assert value(metrics["kiteq_transactions_unknown"]) == 1
    assert 101 <= value(metrics["kiteq_transactions_oldest_age_seconds"], group="orders") < 120
    assert value(metrics["kiteq_transactions_age_alarm"]) == 1
    assert (told["open"], told["alarm"]) == (2, True)
    assert (answer.status, answer.json["status"]) == (200, "degraded")
    assert answer.json["reasons"][0].startswith("a transaction is undecided for 1")
    assert answer.json["reasons"][0].endswith("half_age_alarm is 100s")


async def test_checks_and_parked_transactions_are_counted(tmp_path: Path) -> None:
    clock = JumpingClock()
    async with serving(tmp_path / "db", clock, check_limit=1, check_after=0.1) as (broker, address):
        owner = await connect(broker, "orders", topics=["t"])
        await owner.prepare(numbered(2))
        clock.advance(1)
        asked = await owner.wait(Ask)
        tokens = asked.tokens if len(asked.tokens) == 2 else [*asked.tokens, *(await owner.wait(Ask)).tokens]
        await owner.decide(DECISION_UNKNOWN, tokens[:1])
        await owner.decide(DECISION_RUNNING, tokens[1:])
        metrics = await scrape(address)
        health = (await get(address, "/healthz")).json
    assert value(metrics["kiteq_transaction_checks"]) == 2
    assert value(metrics["kiteq_transaction_check_answers"], answer="unknown") == 1
    assert value(metrics["kiteq_transaction_check_answers"], answer="running") == 1
    assert value(metrics["kiteq_transactions_parked"], group="orders") == 1
    assert value(metrics["kiteq_transactions_open"], group="orders") == 1
    assert health == {
        "status": "degraded",
        "reasons": ["1 transactions are parked: nobody could say whether they were committed"],
    }
