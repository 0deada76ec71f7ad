"""Brokers that share their bindings through a real ZooKeeper, and are found in it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from kazoo.client import KazooClient

from kiteq.binding.bindings import Binding, direct, fanout
from kiteq.broker import Broker
from kiteq.pipe.reports import health
from tests.e2e.wire import RawClient, Refused, connect, numbered, running
from tests.registry.parts import in_thread, until
from tests.support.broker import BrokerProcess
from tests.support.zookeeper import ZooKeeperProcess

pytestmark = pytest.mark.slow


@asynccontextmanager
async def joined(folder: Path, url: str, **settings: Any) -> AsyncIterator[Broker]:
    async with running(folder, zkhost=url, zk_timeout=1.0, **settings) as broker:
        yield broker


@asynccontextmanager
async def two(tmp_path: Path, url: str) -> AsyncIterator[tuple[Broker, Broker]]:
    async with joined(tmp_path / "one", url) as one, joined(tmp_path / "two", url) as other:
        yield one, other


@pytest.fixture
def hand_of_own(own_zookeeper: ZooKeeperProcess) -> Iterator[Any]:
    client = KazooClient(own_zookeeper.address, timeout=10)
    client.start()
    client.chroot = "/contradictions"
    yield client
    client.stop()
    client.close()


def bound(broker: Broker, group: str = "g", topic: str = "t") -> set[str]:
    """Return the patterns that are in force for a group."""
    outlet = broker.core.deliveries.group(group).outlets.get(topic)
    return set() if outlet is None else {one.pattern for one in outlet.subscription.bindings}


def seen(broker: Broker, group: str = "g", topic: str = "t") -> set[str]:
    """Return the patterns that the broker knows the registry to hold: it has them in force a moment before."""
    assert broker.core.registration is not None
    return {pattern for _, pattern in broker.core.registration._seen.get((topic, group), {})}


async def bind(broker: Broker, *bindings: Binding, group: str = "g") -> RawClient:
    return await connect(broker, group, *bindings)


def shared(hand: Any, topic: str = "t", group: str = "g") -> list[str] | None:
    """Return the patterns that a node of the registry holds, None without a node."""
    path = f"/kiteq/sub/{topic}/{group}-bind"
    if hand.exists(path) is None:
        return None
    return [one["messageType"] for one in json.loads(hand.get(path)[0])]


async def test_a_binding_made_at_one_broker_is_in_force_at_the_other(tmp_path: Path, url: str) -> None:
    async with two(tmp_path, url) as (one, other):
        await bind(one, direct("t", "a"))
        await until(lambda: bound(other) == {"a"})

        producer = await connect(other, "producers")
        assert (await producer.publish(numbered(1))).groups == 1


async def test_programs_of_a_rolling_deploy_do_not_remove_each_others_bindings(tmp_path: Path, url: str) -> None:
    async with two(tmp_path, url) as (one, other):
        await bind(one, direct("t", "old"))
        await bind(other, direct("t", "new"))

        await until(lambda: bound(one) == bound(other) == {"old", "new"})


async def test_what_was_kept_at_every_broker_is_taken_over_though_the_registry_brought_the_binding(
    tmp_path: Path, url: str
) -> None:
    async with two(tmp_path, url) as (one, other):
        for start, broker in enumerate((one, other)):
            producer = await connect(broker, "producers")
            await producer.publish(numbered(1, start=start))
        first = await bind(one, fanout("t", start="first"))
        await until(lambda: bound(other) == {"*"})
        second = await bind(other, fanout("t", start="first"))
        again = await bind(other, fanout("t", start="first"))

        for number, consumer in enumerate((first, second)):
            await consumer.credit(10)
            assert [one.number for one in await consumer.take(1)] == [number]
        await again.credit(10)
        await again.take_nothing()


async def test_bindings_that_contradict_those_made_elsewhere_are_refused(tmp_path: Path, url: str) -> None:
    async with two(tmp_path, url) as (one, other):
        await bind(one, direct("t", "a", watermark=10))
        await until(lambda: bound(other))
        with pytest.raises(Refused, match="watermark") as refused:
            await bind(other, direct("t", "b", watermark=20))
        assert refused.value.code == "binding_conflict"
        assert bound(one) == bound(other) == {"a"}


async def test_a_binding_removed_at_one_broker_is_removed_at_the_other(tmp_path: Path, url: str, hand: Any) -> None:
    async with two(tmp_path, url) as (one, other):
        client = await bind(one, direct("t", "a"), direct("t", "b"))
        await until(lambda: bound(other) == {"a", "b"})
        await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="a")
        assert bound(one) == {"b"}
        await until(lambda: bound(other) == {"b"})

        await client.admin("group.drop", group="g")
        await until(lambda: not bound(other))
        assert shared(hand) == []


async def test_a_binding_removed_while_a_broker_was_down_is_removed_there_too(tmp_path: Path, url: str) -> None:
    async with joined(tmp_path / "one", url) as one:
        async with joined(tmp_path / "two", url) as other:
            await bind(one, direct("t", "a"), direct("t", "b"))
            await until(lambda: bound(other) == seen(other) == {"a", "b"})
        client = await connect(one, "administrators")
        await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="a")

        async with joined(tmp_path / "two", url) as other:
            assert bound(other) == {"b"}, "known before the first client comes"


async def test_bindings_of_an_embedded_registry_are_brought_into_one_with_others(tmp_path: Path, url: str) -> None:
    async with running(tmp_path / "one") as alone:
        await bind(alone, direct("t", "before"))
    async with joined(tmp_path / "two", url) as other:
        await bind(other, direct("t", "others"))
        async with joined(tmp_path / "one", url) as one:
            await until(lambda: bound(one) == bound(other) == {"before", "others"})


async def test_bindings_of_an_embedded_registry_fill_an_empty_one(tmp_path: Path, url: str, hand: Any) -> None:
    async with running(tmp_path / "one") as alone:
        await bind(alone, direct("t", "before"))
    async with joined(tmp_path / "one", url):
        await until(lambda: shared(hand) == ["before"])


async def test_an_outage_keeps_nobody_from_binding_and_a_restart_during_it_knows_all(
    tmp_path: Path, own_zookeeper: ZooKeeperProcess
) -> None:
    url = f"zk://{own_zookeeper.address}/outage"
    async with two(tmp_path, url) as (one, other):
        client = await bind(one, direct("t", "a"), direct("t", "removed"))
        await until(lambda: bound(other) == {"a", "removed"})
        await in_thread(own_zookeeper.kill)
        await until(lambda: one.core.registry is not None and one.core.registry.state.degraded)
        assert health(one.core).status == "degraded"

        await bind(one, direct("t", "b"))
        await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="removed")
        assert (await client.publish(numbered(1))).groups == 1
    async with joined(tmp_path / "one", url) as one:
        assert bound(one) == {"a", "b"}, "from the store: the outage goes on"
        await in_thread(own_zookeeper.start)
        async with joined(tmp_path / "two", url) as other:
            await until(lambda: bound(one) == bound(other) == {"a", "b"})
            await until(lambda: health(one.core).status == "ok")


async def test_contradictions_of_two_brokers_in_an_outage_end_with_one_of_them_and_cost_no_message(
    tmp_path: Path, own_zookeeper: ZooKeeperProcess, hand_of_own: Any
) -> None:
    url = f"zk://{own_zookeeper.address}/contradictions"
    async with two(tmp_path, url) as (one, other):
        clients = [await bind(broker, direct("t", "a")) for broker in (one, other)]
        for client in clients:
            await client.publish(numbered(1))
        await in_thread(own_zookeeper.kill)
        for broker in (one, other):
            await until(lambda broker=broker: health(broker.core).status == "degraded")  # type: ignore[misc]
        await bind(one, direct("t", "a", watermark=10))
        await bind(other, direct("t", "b"))
        await in_thread(own_zookeeper.start)
        for broker in (one, other):
            await until(lambda broker=broker: health(broker.core).status == "ok")  # type: ignore[misc]

        def agreed() -> bool:
            here, there = (broker.core.router.submitted("g", "t") for broker in (one, other))
            return here == there and set(shared(hand_of_own) or ()) == bound(one) == bound(other)

        await until(agreed)
        assert "a" in bound(one)
        assert [(await client.row("g"))["pending"] for client in clients] == [1, 1]


async def test_a_wiped_registry_unbinds_nobody_and_is_filled_again(
    tmp_path: Path, own_zookeeper: ZooKeeperProcess
) -> None:
    url = f"zk://{own_zookeeper.address}/wiped"
    async with two(tmp_path, url) as (one, other):
        await bind(one, direct("t", "a"))
        await until(lambda: bound(other) == {"a"})
        await in_thread(own_zookeeper.kill)
        await in_thread(own_zookeeper.wipe)
        await in_thread(own_zookeeper.start)
        async with joined(tmp_path / "three", url) as third:
            await until(lambda: bound(third) == {"a"})
        assert bound(one) == bound(other) == {"a"}


async def test_a_node_deleted_by_hand_unbinds_nobody_neither_now_nor_at_a_restart(
    tmp_path: Path, url: str, hand: Any
) -> None:
    async with two(tmp_path, url) as (one, other):
        await bind(one, direct("t", "a"))
        await until(lambda: bound(other) == {"a"})
        hand.delete("/kiteq/sub/t/g-bind")
        await bind(one, direct("t", "b"), group="h")
        await until(lambda: bound(other, "h") == {"b"})  # so it has seen the deletion before
        assert bound(one) == bound(other) == {"a"}
    async with two(tmp_path, url) as (one, other):
        await until(lambda: shared(hand) == ["a"])
        assert bound(one) == bound(other) == {"a"}


async def test_a_broker_is_announced_while_it_serves_and_no_longer_when_it_drains(
    tmp_path: Path, url: str, hand: Any
) -> None:
    def announced(topic: str) -> list[str]:
        found: list[str] = hand.get_children(path) if hand.exists(path := f"/kiteq/server/{topic}") else []
        return found

    async with joined(tmp_path / "one", url, topics=("t", "u")) as one:
        await until(lambda: announced("t") == announced("u") == [one.address])
        node = json.loads(hand.get(f"/kiteq/server/t/{one.address}")[0])
        assert (node["brokerId"], node["epoch"], node["wireVersion"]) == (one.core.store.broker_id, 1, 2)
        consumer = await bind(one, direct("t", "a"))
        await consumer.credit(1)
        await (await connect(one, "p", topics=["t"])).publish(numbered(1))
        await consumer.take(1)  # holds the drain up until it is settled
        await until(lambda: hand.exists("/kiteq/pub/t/p") and hand.get_children("/kiteq/pub/t/p") == [one.address])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.drain)
            await until(lambda: not announced("t") and not announced("u"))
            assert one.core.peers, "clients may still finish"
            await consumer.goodbye()


async def test_a_broker_at_any_topic_is_announced_for_every_one(tmp_path: Path, url: str, hand: Any) -> None:
    async with joined(tmp_path / "one", url, advertise="broker-1.example:13800"):
        await until(lambda: hand.exists("/kiteq/server/*/broker-1.example:13800"))


async def test_a_broker_that_was_killed_is_announced_again_though_its_old_session_lives(
    tmp_path: Path, url: str, hand: Any
) -> None:
    async with BrokerProcess(tmp_path, "--zkhost", url.removeprefix("zk://"), "--zk-timeout", "10s") as broker:
        path = f"/kiteq/server/*/{broker.address}"
        await until(lambda: hand.exists(path))
        owner = hand.exists(path).ephemeralOwner
        broker.kill()
        assert hand.exists(path).ephemeralOwner == owner
        await in_thread(broker.start)
        await until(lambda: (stat := hand.exists(path)) and stat.ephemeralOwner != owner)
        assert json.loads(hand.get(path)[0])["epoch"] == 2


async def test_wrong_credentials_end_the_start_with_a_sentence(tmp_path: Path) -> None:
    with ZooKeeperProcess(users={"kiteq": "right"}) as zookeeper:
        broker = BrokerProcess(tmp_path, "--zkhost", zookeeper.address, environment={"KITEQ_ZK_AUTH": "kiteq:wrong"})
        with pytest.raises(AssertionError):
            await in_thread(broker.start)
        assert "does not accept the user and password of KITEQ_ZK_AUTH" in broker.log()
        assert "Traceback" not in broker.log()
        assert "wrong" not in broker.log()
