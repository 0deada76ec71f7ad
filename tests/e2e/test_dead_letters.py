"""Dead letters: how a message becomes one, and what an administrator does with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from kiteq.binding.bindings import direct, fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.remoting import packets
from kiteq.store import store
from kiteq.store.tables import Table
from tests.e2e.wire import PATIENCE_SECONDS, JumpingClock, RawClient, Refused, connect, numbered, running

SWEEP_SECONDS = 31
"""A little more than the broker takes from one look for expired messages to the next."""


@pytest.fixture
def hurried() -> MockClock:
    """Trio's clock, at its usual rate, that a test can put forward: a fixture of this kind becomes trio's clock."""
    return MockClock(rate=1)


async def test_a_rejected_message_becomes_a_dead_letter_with_its_reason(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    other = await connect(server, "other", fanout("t"), window=10)
    sent = Message("t", "a", b"poison", properties={"trace": "7"})
    await producer.publish([sent])
    await consumer.reject(await consumer.take(1), "cannot be parsed")
    (letter,) = await producer.admin("dlq.list", group="g")
    assert (letter["id"], letter["reason"], letter["error"]) == (sent.id.hex(), "rejected", "cannot be parsed")
    assert (letter["topic"], letter["message_type"], letter["attempts"]) == ("t", "a", 1)
    shown = await producer.admin("dlq.show", group="g", id=sent.id.hex())
    assert (shown["body"], shown["properties"]) == (b"poison", {"trace": "7"})
    assert await producer.admin("dlq.list", group="other") == []
    await other.ack(await other.take(1))
    row = await producer.row("g")
    assert (row["pending"], row["dead"]) == (0, 1)


async def test_at_the_delivery_limit_a_message_becomes_a_dead_letter_with_its_history(
    server: Broker, producer: RawClient
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    await producer.publish([Message("t", "a", b"x", deliver_limit=2), Message("t", "a", b"y", deliver_limit=1)])
    first, second = await consumer.take(2)
    await consumer.nack([first], "one")
    await consumer.nack([second], "only")
    await consumer.nack(await consumer.take(1), "two")
    await consumer.take_nothing()
    letters = {letter["error"]: letter for letter in await producer.admin("dlq.list", group="g")}
    assert {(one["reason"], one["attempts"]) for one in letters.values()} == {
        ("delivery limit", 2),
        ("delivery limit", 1),
    }
    shown = await producer.admin("dlq.show", group="g", id=letters["two"]["id"])
    assert [entry["error"] for entry in shown["history"]] == ["one", "two"]


async def test_a_message_that_expires_while_its_group_is_connected_becomes_a_dead_letter(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=1)
    await producer.publish([*numbered(1), *numbered(3, start=1, ttl=10), *numbered(1, start=4)])
    taken = await consumer.take(1)
    clock.advance(11)
    await consumer.ack(taken)
    (later,) = await consumer.take(1)
    assert later.number == 4
    await consumer.wait_row("g", dead=3, pending=1)
    assert {letter["reason"] for letter in await producer.admin("dlq.list", group="g")} == {"expired"}


async def test_what_expires_behind_a_held_message_becomes_a_dead_letter_without_waiting_for_it(
    server: Broker, producer: RawClient, clock: JumpingClock, hurried: MockClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=1)
    await producer.publish([*numbered(1), *numbered(3, start=1, ttl=10)])
    await consumer.take(1)
    clock.advance(12)
    hurried.jump(SWEEP_SECONDS)
    await consumer.wait_row("g", dead=3, pending=1)


async def test_messages_of_an_absent_group_expire_too(
    server: Broker, producer: RawClient, clock: JumpingClock, hurried: MockClock
) -> None:
    await (await connect(server, "g", fanout("t"))).goodbye()
    await producer.publish([*numbered(5), *numbered(5, start=5, ttl=10), *numbered(5, start=10)])
    clock.advance(12)
    hurried.jump(SWEEP_SECONDS)
    await producer.wait_row("g", dead=5, pending=10)
    consumer = await connect(server, "g", window=100)
    assert [one.number for one in await consumer.take(10)] == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]


async def test_what_expires_deep_in_an_absent_groups_backlog_is_found(
    server: Broker, producer: RawClient, clock: JumpingClock, hurried: MockClock
) -> None:
    await (await connect(server, "g", fanout("t"))).goodbye()
    for _ in range(4):
        await producer.publish([Message("t", "a", bytes(500_000))])
    await producer.publish(numbered(5, ttl=10))
    clock.advance(12)
    hurried.jump(SWEEP_SECONDS)
    await producer.wait_row("g", dead=5, pending=4)


async def test_a_message_that_expires_while_it_waits_for_another_attempt_becomes_a_dead_letter(
    server: Broker, producer: RawClient, clock: JumpingClock, hurried: MockClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    await producer.publish(numbered(1, ttl=100))
    await consumer.nack(await consumer.take(1), after_ms=50_000)
    await consumer.goodbye()
    clock.advance(101)
    hurried.jump(SWEEP_SECONDS)
    await producer.wait_row("g", dead=1, retrying=0)


@pytest.fixture
async def dead(server: Broker, producer: RawClient) -> RawClient:
    """A consumer that has rejected five messages of each of two topics."""
    consumer = await connect(server, "g", fanout("t"), fanout("u"), window=10)
    await producer.publish([*numbered(5), *numbered(5, "u")])
    await consumer.reject(await consumer.take(10), "no")
    return consumer


async def test_replaying_gives_dead_letters_to_their_group_again_as_new(dead: RawClient, producer: RawClient) -> None:
    (first, *_) = await producer.admin("dlq.list", group="g", topic="t")
    assert await producer.admin("dlq.replay", group="g", id=first["id"]) == {"replayed": 1}
    (again,) = await dead.take(1)
    assert (again.blob[:16].hex(), again.attempt) == (first["id"], 1)
    await dead.ack([again])
    assert await producer.admin("dlq.replay", group="g", topic="u") == {"replayed": 5}
    assert sorted(one.number for one in await dead.take(5)) == [0, 1, 2, 3, 4]
    assert len(await producer.admin("dlq.list", group="g")) == 4


async def test_purging_removes_what_was_named_and_nothing_else(dead: RawClient, producer: RawClient) -> None:
    (first, *_) = await producer.admin("dlq.list", group="g", topic="t")
    assert await producer.admin("dlq.purge", group="g", id=first["id"]) == {"purged": 1}
    assert await producer.admin("dlq.purge", group="g", topic="u") == {"purged": 5}
    left = await producer.admin("dlq.list", group="g")
    assert len(left) == 4
    assert first["id"] not in {letter["id"] for letter in left}
    with pytest.raises(Refused) as refused:
        await producer.admin("dlq.show", group="g", id=first["id"])
    assert refused.value.code == "unknown_message"
    await dead.take_nothing(0.05)


async def test_a_replayed_letter_survives_a_restart_beside_new_failures(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock) as broker:
        consumer = await connect(broker, "g", direct("t", "a"), window=10)
        await consumer.publish(numbered(1))
        await consumer.reject(await consumer.take(1), "no")
        await consumer.goodbye()
        admin = await connect(broker, "admin")
        await admin.admin("dlq.replay", group="g")
    async with running(folder, clock) as broker:
        consumer = await connect(broker, "g")
        await consumer.publish(numbered(1, start=1))
        await consumer.credit(10)
        taken = await consumer.take(2)
        assert sorted(one.number for one in taken) == [0, 1]
        await consumer.nack(taken, after_ms=1000)
    async with running(folder, clock) as broker:
        consumer = await connect(broker, "g", window=10)
        clock.advance(2)
        assert sorted((one.number, one.attempt) for one in await consumer.take(2)) == [(0, 2), (1, 2)]


async def test_dead_letters_survive_a_restart(folder: Path) -> None:
    async with running(folder) as broker:
        consumer = await connect(broker, "g", fanout("t"), window=10)
        await consumer.publish(numbered(3))
        await consumer.reject(await consumer.take(3), "no")
        before = await consumer.admin("dlq.list", group="g")
    async with running(folder) as broker:
        admin = await connect(broker, "admin")
        assert await admin.admin("dlq.list", group="g") == before
        assert (await admin.row("g"))["dead"] == 3
        await trio.lowlevel.checkpoint()


async def test_dead_letters_of_several_pages_are_all_listed_shown_replayed_and_purged(
    server: Broker, producer: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PAGE_BYTES", 300)
    consumer = await connect(server, "g", fanout("t"), fanout("u"), window=20)
    await producer.publish([*numbered(10), *numbered(10, "u")])
    taken = await consumer.take(20)
    await consumer.reject(taken, "no")
    assert len(await producer.admin("dlq.list", group="g", limit=15)) == 15
    letters = await producer.admin("dlq.list", group="g")
    assert {letter["id"] for letter in letters} == {one.blob[:16].hex() for one in taken}
    assert (await producer.admin("dlq.show", group="g", id=letters[-1]["id"]))["topic"] == "u"
    assert await producer.admin("dlq.purge", group="g", topic="u") == {"purged": 10}
    assert await producer.admin("dlq.replay", group="g") == {"replayed": 10}
    await consumer.reject(await consumer.take(10), "no")
    await producer.wait_row("g", dead=10)
    await producer.admin("group.drop", group="g")
    kept = server.core.store.tables
    with trio.fail_after(PATIENCE_SECONDS):
        while kept.scan(Table.DEAD, b"", b"\xff" * 32):  # noqa: ASYNC110 nothing tells of it
            await trio.sleep(0.01)


async def test_administrative_requests_beyond_a_bound_are_refused_for_the_moment(
    server: Broker, dead: RawClient
) -> None:
    await dead.send(*(packets.Admin(1_000 + one, "dlq.list", {"group": "g"}) for one in range(40)))
    answered = 0
    for one in range(40):
        try:
            await dead.wait(packets.AdminReply, 1_000 + one)
            answered += 1
        except Refused as refused:
            assert (refused.code, refused.temporary) == ("busy", True)  # noqa: PT017
    assert 16 <= answered < 40
    assert len(await dead.admin("dlq.list", group="g")) == 10
