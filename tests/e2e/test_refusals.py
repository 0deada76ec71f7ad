"""Bad input and overload: refused with a reason, at the cost of one connection at most."""

from __future__ import annotations

import itertools
import socket
import struct
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.remoting import packets
from kiteq.store.tables import Usage
from tests.e2e.wire import RawClient, Refused, connect, numbered, open_raw, running


@pytest.fixture
def hurried() -> MockClock:
    return MockClock(rate=1)


@pytest.mark.parametrize("linger", [None, struct.pack("ii", 1, 0)], ids=["closed", "reset"])
async def test_a_probe_that_connects_and_goes_is_no_warning(server: Broker, linger: bytes | None) -> None:
    with capture_logs() as logs:
        with socket.create_connection(
            (server.address.partition(":")[0], int(server.address.partition(":")[2]))
        ) as probe:
            if linger is not None:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        while not logs:
            await trio.lowlevel.checkpoint()
    assert [(one["event"], one["log_level"]) for one in logs] == [("connection ended", "debug")]


@pytest.mark.parametrize(
    ("frame", "word"),
    [
        (b"\0\0\0\1\x07", "list"),
        (b"\0\0\0\1\xc1", "msgpack"),
        (b"\0\0\0\0", "bytes"),
        (b"\x7f\xff\xff\xff", "bytes"),
        (b"\0\0\0\3\x92\x63\x01", "unknown packet type"),
        (b"\0\0\0\3\x92\x02\x01", "Welcome"),
    ],
)
async def test_a_bad_frame_closes_its_own_connection_with_a_reason(
    server: Broker, producer: RawClient, frame: bytes, word: str
) -> None:
    bad = await connect(server, "g")
    await bad.stream.send_all(frame)
    refusal = await bad.closed()
    assert refusal is not None
    assert (refusal.request, refusal.code) == (0, "bad_frame")
    assert word in refusal.reason
    assert (await producer.publish(numbered(1))).durable


async def test_a_frame_over_the_limit_is_refused_before_it_has_arrived(server: Broker) -> None:
    stranger = await open_raw(server)
    await stranger.stream.send_all((1 << 20).to_bytes(4, "big"))
    refusal = await stranger.closed()
    assert refusal is not None
    assert refusal.code == "bad_frame"


async def test_a_connection_that_speaks_before_it_greets_is_refused(server: Broker) -> None:
    stranger = await open_raw(server)
    await stranger.send(packets.Publish(1, [numbered(1)[0].encoded()]))
    refusal = await stranger.closed()
    assert refusal is not None
    assert refusal.code == "not_authenticated"


async def test_a_connection_that_never_greets_is_closed(server: Broker, hurried: MockClock) -> None:
    stranger = await open_raw(server)
    await trio.sleep(0.05)
    hurried.jump(5.1)
    refusal = await stranger.closed()
    assert refusal is not None
    assert refusal.code == "not_authenticated"


async def test_a_connection_that_falls_silent_is_closed(server: Broker, hurried: MockClock) -> None:
    silent = await connect(server, "g")
    hurried.jump(20)
    await silent.ask(packets.Ping, packets.Pong)
    hurried.jump(20)
    await silent.ask(packets.Ping, packets.Pong)
    hurried.jump(36)
    refusal = await silent.closed()
    assert refusal is not None
    assert refusal.code == "idle"


async def test_one_bad_message_does_not_harm_its_neighbours(server: Broker, producer: RawClient) -> None:
    good = [message.encoded() for message in numbered(2)]
    damaged = bytearray(good[0])
    damaged[-5] ^= 1
    large = Message("t", "a", bytes((1 << 20) + 1)).encoded()
    receipts = await producer.publish([good[0], bytes(damaged), b"short", good[1]])
    assert [(index, code) for index, code, *_ in receipts.exceptions] == [(1, "bad_checksum"), (2, "bad_checksum")]
    receipts = await producer.publish([large])
    assert receipts.exceptions[0][1] == "message_too_large"


async def test_too_many_connections_are_refused_with_a_reason(folder: Path) -> None:
    async with running(folder, connections=2) as broker:
        clients = [await connect(broker, "g") for _ in range(2)]
        third = await open_raw(broker)
        refusal = await third.closed()
        assert refusal is not None
        assert refusal.code == "too_many_connections"
        await clients[0].break_off()
        with trio.fail_after(5):
            while len(broker.core.peers) > 1:  # noqa: ASYNC110 the broker notices by itself
                await trio.sleep(0.01)
        await connect(broker, "g")


async def test_a_consumer_that_never_reads_is_cut_off_and_others_go_on(
    server: Broker, producer: RawClient, hurried: MockClock
) -> None:
    deaf = await connect(server, "deaf", fanout("t"), window=10_000)
    good = await connect(server, "good", fanout("t"), window=10_000)
    for _ in range(30):
        await producer.publish([Message("t", "a", bytes(900_000))])
        await good.ack(await good.take(1))
    hurried.jump(10.5)
    await producer.wait_row("deaf", members=0, in_flight=0, pending=30)
    await deaf.break_off()
    again = await connect(server, "deaf", window=5)
    assert [one.attempt for one in await again.take(5)] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("disk_free_min", "disk_size", "needed"),
    [
        (None, 100 << 30, 5 << 30),
        (None, 10 << 30, 1 << 30),
        (None, 1 << 30, 1 << 29),
        (64 << 20, 100 << 30, 64 << 20),
        (20 << 30, 100 << 30, 20 << 30),
        (80 << 30, 100 << 30, 50 << 30),
    ],
)
async def test_a_nearly_full_disk_refuses_publishing_until_there_is_room(
    monkeypatch: pytest.MonkeyPatch, hurried: MockClock, disk_free_min: int | None, disk_size: int, needed: int
) -> None:
    async def refusing(*, is_refusing: bool) -> None:
        hurried.jump(1.5)
        while (broker.core.refusing is not None) != is_refusing:  # noqa: ASYNC110 the broker tells nobody of it
            await trio.sleep(0.01)

    free = needed - 1
    async with running("memory://", disk_free_min=disk_free_min) as broker:
        monkeypatch.setattr(broker.core.store, "usage", lambda: Usage(0, 1 << 40, disk_free=free, disk_size=disk_size))
        producer = await connect(broker, "p")
        with trio.fail_after(8):
            await refusing(is_refusing=True)
            with pytest.raises(Refused) as refused:
                await producer.publish(numbered(1))
            assert (refused.value.code, refused.value.temporary) == ("disk_full", True)
            assert refused.value.reason == (
                f"the disk has {free} bytes free, {needed} are needed; make room, or lower --disk-free-min"
            )
            free = needed
            await refusing(is_refusing=False)
            await producer.publish(numbered(1))


async def test_that_publishing_is_refused_is_logged_once_however_the_figures_change(
    monkeypatch: pytest.MonkeyPatch, hurried: MockClock
) -> None:
    looks = itertools.count(1)
    looked = 0

    def usage() -> Usage:
        nonlocal looked
        looked = next(looks)
        return Usage(0, 1 << 40, disk_free=looked, disk_size=100 << 30)

    with capture_logs() as logs, trio.fail_after(8):
        async with running("memory://") as broker:
            monkeypatch.setattr(broker.core.store, "usage", usage)
            while looked < 4:
                hurried.jump(1.1)
                await trio.sleep(0.01)
    assert [line["event"] for line in logs if "publishing" in line["event"]] == ["publishing is refused"]


async def test_a_full_store_refuses_publishing_with_a_reason_while_acks_go_on(folder: Path) -> None:
    async with running(folder, store_limit=16 << 20) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"), window=10_000)
        sent = 0
        with pytest.raises(Refused) as refused:
            while sent < 300:
                await producer.publish([Message("t", "a", bytes(200_000))])
                sent += 1
        assert refused.value.code == "store_full"
        assert refused.value.temporary
        taken = await consumer.take(min(sent, 60))
        assert await consumer.ack(taken) == []
        with trio.fail_after(8):
            while True:
                try:
                    await producer.publish(numbered(1))
                except Refused:
                    await trio.sleep(0.1)
                else:
                    break
        assert (await consumer.row("g"))["pending"] == sent - len(taken) + 1
