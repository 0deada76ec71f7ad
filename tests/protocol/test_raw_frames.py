"""Frames of transactions that break doc/protocol.md close the connection; requests that are refused do not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgpack
import pytest

from tests.protocol.raw_client import PING, PONG, REFUSAL, Message
from tests.protocol.raw_transactions import (
    ASK,
    COMMIT,
    DECIDE,
    DECIDED,
    ENLIST,
    PREPARE,
    PREPARED,
    ROLLBACK,
    TransactionClient,
    frame,
)
from tests.protocol.world import World

pytestmark = pytest.mark.slow

MESSAGE = Message("order", "paid", b"order", id=bytes(range(16))).encode()
ID = MESSAGE[:16]
TOKEN = ID + (1).to_bytes(8, "big")


@pytest.mark.parametrize(
    "packet",
    [
        (PREPARE, 5, [], 1, 0),
        (PREPARE, 5, [], [], 0),
        (PREPARE, 5, ["text"], 1, 0),
        (PREPARE, 5, MESSAGE, 1, 0),
        (PREPARE, 5, [MESSAGE], -1, 0),
        (PREPARE, 5, [MESSAGE], [2, -1], 0),
        (PREPARE, 5, [MESSAGE], [True], 0),
        (PREPARE, 5, [MESSAGE], None, 0),
        (PREPARE, 5, [MESSAGE], 1, -1),
        (PREPARE, 5, [MESSAGE], 1, None),
        (PREPARE, 5, [MESSAGE], 1, 0.5),
        (PREPARE, 5, [MESSAGE], 1, 2**32),
        (PREPARE, 5, [MESSAGE], 1),
        (ENLIST, 5, TOKEN, []),
        (ENLIST, 5, TOKEN, ["text"]),
        (ENLIST, 5, b"", [MESSAGE]),
        (ENLIST, 5, TOKEN[:8], [MESSAGE]),
        (ENLIST, 5, TOKEN[:17], [MESSAGE]),
        (ENLIST, 5, TOKEN + b"1", [MESSAGE]),
        (ENLIST, 5, "sixteen letters.", [MESSAGE]),
        (ENLIST, 5, TOKEN),
        (DECIDE, 5, COMMIT, []),
        (DECIDE, 5, COMMIT, [TOKEN, b""]),
        (DECIDE, 5, COMMIT, [TOKEN[:15]]),
        (DECIDE, 5, COMMIT, [TOKEN[:23]]),
        (DECIDE, 5, COMMIT, [TOKEN + b"1"]),
        (DECIDE, 5, COMMIT, ["sixteen letters."]),
        (DECIDE, 5, COMMIT, TOKEN),
        (DECIDE, 5, 4, [TOKEN]),
        (DECIDE, 5, -1, [TOKEN]),
        (DECIDE, 5, True, [TOKEN]),
        (DECIDE, 5, COMMIT),
        (PREPARED, 5, 1, []),
        (DECIDED, 5, []),
        (ASK, 0, 1, [TOKEN], [MESSAGE]),
        *((number, 5, []) for number in range(38, 48)),
    ],
)
def test_a_frame_that_breaks_the_page_closes_the_connection_and_no_other(world: World, packet: tuple[object]) -> None:
    neighbour, client = world.producer(), world.producer()
    answer = client.exchange(frame(*packet))
    assert (answer[:3], answer[4]) == ([REFUSAL, 0, "bad_frame"], False)
    with pytest.raises(OSError):
        client.ask(PING, answer=PONG)
    neighbour.ask(PING, answer=PONG)


@pytest.mark.parametrize("sizes", [0, 2, 4, [], [3, 1], [1, 1], [3, 0], [4], [1, 1, 1, 0]], ids=str)
def test_sizes_that_do_not_add_up_are_refused_and_nothing_is_stored(world: World, sizes: object) -> None:
    producer = world.producer()
    messages = [world.message() for _ in range(3)]
    answer = producer.exchange(frame(PREPARE, 5, messages, sizes, 0))
    assert (answer[:3], answer[4]) == ([REFUSAL, 5, "bad_argument"], False)
    assert producer.admin("tx.list", group=world.group) == []
    assert producer.publish(*messages)[2] == []


@pytest.mark.parametrize("check_after_ms", [1, 99, 86_400_001, 2**32 - 1])
def test_a_time_to_the_first_check_out_of_range_is_refused(world: World, check_after_ms: int) -> None:
    producer = world.producer()
    answer = producer.exchange(frame(PREPARE, 5, [world.message()], 1, check_after_ms))
    assert (answer[:3], answer[4]) == ([REFUSAL, 5, "bad_limit"], False)
    assert producer.admin("tx.list", group=world.group) == []


def test_items_after_the_known_ones_are_ignored(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    message = world.message()
    kind, request, handle, exceptions, *_ = producer.exchange(frame(PREPARE, 5, [message], 1, 0, "later", {}))
    assert (kind, request, exceptions) == (PREPARED, 5, [])
    token = message[:16] + handle.to_bytes(8, "big")
    assert producer.exchange(frame(ENLIST, 6, token, [world.message()], None)) == [PREPARED, 6, handle, []]
    assert producer.exchange(frame(DECIDE, 7, COMMIT, [token], 1.5)) == [DECIDED, 7, []]
    assert [consumer.body() for _ in range(2)] == [b"order", b"order"]


def test_the_frames_of_the_page_are_taken_and_answered_as_it_says(own_world: World) -> None:
    text = (Path(__file__).resolve().parents[2] / "doc" / "protocol.md").read_text()
    frames = {name: bytes.fromhex(data) for name, data in re.findall(r"```frame (\w+)\n(.*?)```", text, re.DOTALL)}
    with TransactionClient(own_world.broker.host, own_world.broker.port) as client:
        client.exchange(frames["Hello"])
        for request, answer in (("Prepare", "Prepared"), ("Decide", "Decided")):
            assert frame(*client.exchange(frames[request])) == frames[answer]
    _, _, _, [token], [message] = msgpack.unpackb(frames["Ask"][4:])
    assert message in frames["Prepare"]
    assert token in frames["Decide"]
    assert frame(ASK, 0, 1, [token], [message]) == frames["Ask"]


def test_a_request_with_an_exception_leaves_the_connection_open(world: World) -> None:
    producer = world.producer()
    answer = producer.exchange(frame(DECIDE, 5, ROLLBACK, [os.urandom(24)]))
    assert answer[:2] == [DECIDED, 5]
    assert producer.exchange(frame(PREPARE, 6, [b"no message"], 1, 0))[3][0][1] == "bad_checksum"
    producer.ask(PING, answer=PONG)
