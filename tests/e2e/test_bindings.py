"""Bindings: what they match, what is refused, how they go."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from kiteq import recovery
from kiteq.binding.bindings import direct, fanout, regex
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.remoting import packets
from kiteq.store.tables import Table
from tests.e2e.wire import PATIENCE_SECONDS, RawClient, Refused, connect, numbered, open_raw, running


def log_rows(broker: Broker) -> int:
    return len(broker.core.store.tables.scan(Table.LOG, b"", b"\xff" * 16))


async def test_overlapping_bindings_of_a_group_give_one_delivery(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", direct("t", "a"), regex("t", "[ab]"), fanout("t"), window=10)
    receipts = await producer.publish(numbered(3))
    assert receipts.groups == 1
    assert [one.number for one in await consumer.take(3)] == [0, 1, 2]
    await consumer.take_nothing()


async def test_each_kind_of_binding_matches_what_it_says(server: Broker, producer: RawClient) -> None:
    exact = await connect(server, "exact", direct("t", "pay"), window=10)
    pattern = await connect(server, "pattern", regex("t", "pay-.*|re+"), window=10)
    everything = await connect(server, "everything", fanout("t"), window=10)
    types = ["pay", "pay-ok", "xpay-ok", "ree", "reex"]
    receipts = await producer.publish([Message("t", kind, kind.encode()) for kind in types])
    assert receipts.groups == [2, 2, 1, 2, 1]
    assert [one.body for one in await exact.take(1)] == [b"pay"]
    assert [one.body for one in await pattern.take(2)] == [b"pay-ok", b"ree"]
    assert [one.body.decode() for one in await everything.take(5)] == types
    await exact.take_nothing()
    await pattern.take_nothing()


async def test_bindings_of_a_group_that_contradict_each_other_are_refused(server: Broker) -> None:
    await connect(server, "g", direct("t", "a", watermark=10))
    other = await open_raw(server)
    with pytest.raises(Refused) as refused:
        await other.hello("g", [direct("t", "b", watermark=20)])
    assert refused.value.code == "binding_conflict"
    assert "'g'" in refused.value.reason
    assert (await connect(server, "g")) is not None


async def test_a_bad_pattern_is_refused_at_subscribe_and_the_connection_lives(server: Broker) -> None:
    client = await connect(server, "g")
    with pytest.raises(Refused) as refused:
        await client.ask(packets.Subscribe, packets.Subscribed, [["t", 1, "(unclosed", None, True, "latest"]])
    assert refused.value.code == "bad_pattern"
    await client.ask(packets.Ping, packets.Pong)


async def test_bindings_survive_a_restart(folder: Path) -> None:
    async with running(folder) as broker:
        await connect(broker, "g", direct("t", "a", watermark=7), regex("u", "x+", persistent=False))
        before = await (await connect(broker, "admin")).admin("group.list")
    async with running(folder) as broker:
        after = await (await connect(broker, "admin")).admin("group.list")
        assert [(row["topic"], row["bindings"]) for row in after] == [(row["topic"], row["bindings"]) for row in before]
        assert (await (await connect(broker, "p")).publish(numbered(1))).groups == 1


async def test_bindings_of_clients_that_connect_at_the_same_moment_all_survive(folder: Path) -> None:
    async with running(folder) as broker:
        clients = [await open_raw(broker) for _ in range(4)]
        for number, client in enumerate(clients):
            wire = [["t", 0, f"type{number}", None, True, "latest"]]
            await client.send(packets.Hello(1, "kiteq", [1], b"%016d" % number, "g", [], wire, 0, 1))
        for client in clients:
            await client.wait(packets.Welcome)
    async with running(folder) as broker:
        row = await (await connect(broker, "admin")).row("g")
        assert {binding["pattern"] for binding in row["bindings"]} == {"type0", "type1", "type2", "type3"}


async def test_unsubscribe_ends_one_binding_and_keeps_the_others(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", direct("t", "a"), direct("t", "b"), window=10)
    await consumer.ask(packets.Unsubscribe, packets.Subscribed, "t", 0, "a")
    receipts = await producer.publish([*numbered(1), *numbered(1, message_type="b", start=7)])
    assert receipts.groups == [0, 1]
    assert [one.number for one in await consumer.take(1)] == [7]


async def test_a_group_that_leaves_a_topic_and_binds_again_at_once_is_a_new_one(folder: Path) -> None:
    async with running(folder) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"))
        await producer.publish(numbered(5))
        await consumer.send(
            packets.Unsubscribe(90, "t", 2, "*"), packets.Subscribe(91, [["t", 2, "*", None, True, "latest"]])
        )
        await consumer.wait(packets.Subscribed, 91)
        assert (await producer.publish(numbered(5, start=5))).groups == 1
        await consumer.wait_row("g", pending=5)
    async with running(folder) as broker:
        consumer = await connect(broker, "g", window=20)
        assert [one.number for one in await consumer.take(5)] == [5, 6, 7, 8, 9]


async def test_dropping_a_group_frees_its_backlog_and_nobody_elses(server: Broker, producer: RawClient) -> None:
    await connect(server, "gone", fanout("t"))
    kept = await connect(server, "kept", direct("t", "b"))
    for number in range(5):
        await producer.publish([*numbered(20, start=100 * number), *numbered(1, message_type="b", start=number)])
    assert await kept.admin("group.drop", group="gone") == {"pending": 105, "retrying": 0, "dead": 0}
    assert [row["group"] for row in await kept.admin("group.list")] == ["kept"]
    await kept.credit(100)
    assert [one.number for one in await kept.take(5)] == [0, 1, 2, 3, 4]
    assert log_rows(server) == 5
    await producer.publish(numbered(1, message_type="b"))
    (last,) = await kept.take(1)
    assert last.number == 0


async def test_what_a_dropped_group_alone_was_owed_leaves_the_disk(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "gone", fanout("t"), window=5)
    await producer.publish(numbered(50))
    held = await consumer.take(5)
    await producer.admin("group.drop", group="gone")
    with trio.fail_after(PATIENCE_SECONDS):
        while log_rows(server):  # noqa: ASYNC110 the broker does it behind the answer
            await trio.sleep(0.02)
    assert await consumer.ack(held) == [held[0].tag, held[-1].tag]
    assert (await producer.publish(numbered(1))).groups == 0


async def test_a_malformed_administrative_request_is_refused_and_the_broker_lives(
    server: Broker, producer: RawClient
) -> None:
    await connect(server, "g", fanout("t"))
    requests: list[tuple[str, dict[str, Any]]] = [
        ("group.unsubscribe", {"group": "g", "topic": "t", "kind": ["direct"], "pattern": "*"}),
        ("group.show", {"group": ["g"]}),
        ("dlq.list", {"group": "g", "topic": ["t"]}),
        ("dlq.purge", {"group": "g", "id": 7}),
        ("no.verb", {}),
    ]
    for verb, arguments in requests:
        with suppress(Refused):  # an argument that cannot match anything may as well find nothing
            await producer.admin(verb, **arguments)
    await producer.ask(packets.Ping, packets.Pong)


async def test_groups_that_are_nowhere_any_more_are_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "SWEEP_SECONDS", 0.01)
    async with running(folder) as broker:
        member = await connect(broker, "there")
        away = await connect(broker, "bound", fanout("t"))
        gone = await connect(broker, "gone", fanout("t"))
        await member.admin("group.drop", group="gone")
        await away.goodbye()
        await gone.goodbye()
        with trio.fail_after(PATIENCE_SECONDS):
            while "gone" in broker.core.deliveries.groups or len(broker.core.peers) > 1:  # noqa: ASYNC110 a timer does it
                await trio.sleep(0.01)
        assert broker.core.deliveries.groups.keys() == {"there", "bound"}
