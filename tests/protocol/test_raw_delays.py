"""Delayed messages are as doc/protocol.md says, for a client written from that page alone and a real broker."""

from __future__ import annotations

import os
import struct
import time
import zlib
from typing import Any

import msgpack
import pytest

from tests.protocol.raw_client import Message, RefusedError
from tests.protocol.raw_transactions import COMMIT, ROLLBACK
from tests.protocol.world import World

pytestmark = pytest.mark.slow

DAYS_366_MS = 31_622_400_000
DELAYED = [[0, "delayed", "", False]]
HOUR_MS = 3_600_000
FLY = 2


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def with_extras(world: World, *extras: object) -> bytes:
    """Return a message with these items as extras."""
    head: bytes = msgpack.packb([world.topic, "paid", 60_000, 100, 0])
    packed: bytes = msgpack.packb(extras)
    rest = os.urandom(16) + struct.pack(">IQH", zlib.crc32(b"order"), now_ms(), len(head)) + head
    rest += struct.pack(">H", len(packed)) + packed + b"order"
    return rest + struct.pack("<I", zlib.crc32(rest))


def test_a_delayed_message_comes_when_its_time_has_come_and_not_before(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    for relative in (True, False):
        due = now_ms() + 700
        fields: dict[str, Any] = {"delay_ms": 700} if relative else {"deliver_at_ms": due}
        data = world.message(**fields)
        assert producer.publish(data) == ([0], True, DELAYED)
        producer.publish(world.message(b"at once"))
        assert consumer.body() == b"at once"
        assert consumer.receive().data == data
        assert now_ms() >= due


@pytest.mark.parametrize(
    "extras",
    [
        ({}, None, 0),
        ({}, None, None, None),
        ({}, None, 0, None),
        ({}, None, None),
        ({}, None, None, 1_000),
        ({}, None, None, 0),
        ({}, None, None, None, "later"),
    ],
    ids=str,
)
def test_no_delay_and_a_time_that_has_passed_are_no_delay(world: World, extras: tuple[object]) -> None:
    producer, consumer = world.producer(), world.consumer()
    data = with_extras(world, *extras)
    assert producer.publish(data) == ([1], True, [])
    assert consumer.receive().data == data


@pytest.mark.parametrize("fields", [{"delay_ms": DAYS_366_MS}, {"deliver_at_ms": now_ms() + DAYS_366_MS - HOUR_MS}])
def test_the_longest_delays_are_taken(world: World, fields: dict[str, Any]) -> None:
    producer = world.producer()
    data = world.message(**fields)
    assert producer.publish(data) == ([0], True, DELAYED)
    assert producer.publish(data)[2] == [[0, "duplicate", "", False]]
    assert producer.admin("msg.cancel", id=data[:16].hex(), group=world.group) == {"cancelled": 1}


@pytest.mark.parametrize(
    ("extras", "code"),
    [
        (({}, None, DAYS_366_MS + 1), "bad_limit"),
        (({}, None, -1), "bad_limit"),
        (({}, None, None, now_ms() + DAYS_366_MS + HOUR_MS), "bad_limit"),
        (({}, None, None, -1), "bad_limit"),
        (({}, None, 1_000, now_ms() + 1_000), "bad_limit"),
        (({}, None, "1000"), "bad_limit"),
        (({}, None, 1.5), "bad_limit"),
        (({}, None), "bad_message"),
    ],
)
def test_delays_that_break_the_page_are_refused(world: World, extras: tuple[object], code: str) -> None:
    producer = world.producer()
    groups, _, [[index, found, reason, temporary]] = producer.publish(with_extras(world, *extras))
    assert (groups, index, found, temporary) == ([0], 0, code, False)
    assert reason


@pytest.mark.parametrize("fields", [{"delay_ms": 1_000}, {"deliver_at_ms": now_ms() + HOUR_MS}])
def test_a_fly_message_takes_no_delay(world: World, fields: dict[str, Any]) -> None:
    [[_, code, _, _]] = world.producer().publish(world.message(flags=FLY, **fields))[2]
    assert code == "fly_not_allowed"


def test_the_groups_bound_when_the_time_comes_get_it(world: World) -> None:
    producer, early = world.producer(), world.consumer(f"early-{world.group}")
    producer.publish(world.message(delay_ms=800))
    early.ask(20, world.topic, 2, "*", answer=19)
    assert world.consumer().body() == b"order"
    assert early.bodies() == set()


def test_the_delay_of_a_transaction_counts_from_its_commit(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    kept, dropped = producer.prepare(
        [world.message(b"delayed", delay_ms=600), world.message(b"at once")],
        [world.message(b"dropped", delay_ms=1)],
        check_after_ms=60_000,
    )[0]
    time.sleep(0.7)
    assert consumer.bodies() == set()
    committed = now_ms()
    assert producer.decide(COMMIT, kept) == []
    assert producer.decide(ROLLBACK, dropped) == []
    assert consumer.body() == b"at once"
    assert consumer.body() == b"delayed"
    assert now_ms() >= committed + 600
    assert consumer.bodies() == set()


def test_a_time_that_passed_before_the_commit_is_no_delay(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(deliver_at_ms=now_ms() + 300), check_after_ms=60_000)
    time.sleep(0.4)
    assert consumer.bodies() == set()
    assert producer.decide(COMMIT, token) == []
    assert consumer.body() == b"order"


def test_a_cancelled_message_is_never_delivered(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    data = world.message(delay_ms=500)
    producer.publish(data)
    named = {"id": data[:16].hex()}
    with pytest.raises(RefusedError, match="unknown_message"):
        producer.admin("msg.cancel", **named, group=world.consumers)
    assert producer.admin("msg.cancel", **named) == {"cancelled": 1}
    with pytest.raises(RefusedError, match="unknown_message"):
        producer.admin("msg.cancel", **named)
    time.sleep(0.7)
    assert consumer.bodies() == set()


def test_delayed_messages_outlive_a_killed_broker(own_world: World) -> None:
    own_world.consumer()
    data = own_world.message(delay_ms=500)
    token = own_world.producer().prepare_one(prepared := own_world.message(b"prepared", delay_ms=500))
    own_world.producer().publish(data)
    own_world.producer().decide(COMMIT, token)
    own_world.broker.kill()
    own_world.broker.start()
    consumer = own_world.consumer()
    assert {consumer.receive().data for _ in range(2)} == {data, prepared}


def test_properties_and_key_travel_with_a_delay(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    sent = Message(
        world.topic, "paid", b"order", properties={"from": "Zürich"}, key="order:7", delay_ms=100, deliver_at_ms=None
    )
    producer.publish(sent.encode())
    assert consumer.receive().message == sent
