"""The duplicate window: a repeated send is stored once, whatever happened in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.remoting import packets
from tests.e2e.wire import RawClient, connect, numbered, running
from tests.support.broker import BrokerProcess


def codes(receipts: packets.Receipts) -> list[tuple[int, str]]:
    return [(index, code) for index, code, *_ in receipts.exceptions]


async def test_a_repeated_send_is_answered_as_a_duplicate_and_stored_once(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    messages = numbered(3)
    await producer.publish(messages)
    again = await producer.publish([*messages[:2], *numbered(1, start=9)])
    assert codes(again) == [(0, "duplicate"), (1, "duplicate")]
    assert again.groups == [0, 0, 1]
    assert [one.number for one in await consumer.take(4)] == [0, 1, 2, 9]
    await consumer.take_nothing(0.05)


async def test_a_repeat_within_one_frame_or_right_behind_it_is_stored_once(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    one, two = (message.encoded() for message in numbered(2))
    await producer.send(packets.Publish(71, [one, two, one]), packets.Publish(72, [two]))
    assert codes(await producer.wait(packets.Receipts, 71)) == [(2, "duplicate")]
    assert codes(await producer.wait(packets.Receipts, 72)) == [(0, "duplicate")]
    assert len(await consumer.take(2)) == 2
    await consumer.take_nothing(0.05)


async def test_an_id_with_another_body_is_refused(server: Broker, producer: RawClient) -> None:
    message = Message("t", "a", b"first")
    await producer.publish([message])
    receipts = await producer.publish([Message("t", "a", b"second", id=message.id)])
    assert codes(receipts) == [(0, "id_reused")]
    assert message.id.hex() in receipts.exceptions[0][2]


async def test_the_window_belongs_to_the_producing_group(server: Broker, producer: RawClient) -> None:
    (message,) = numbered(1)
    await producer.publish([message])
    other = await connect(server, "other-producers")
    assert codes(await other.publish([message])) == []


async def test_a_repeat_is_recognised_after_a_restart(folder: Path) -> None:
    messages = numbered(5)
    async with running(folder) as broker:
        await connect(broker, "g", fanout("t"))
        await (await connect(broker, "p")).publish(messages)
    for _ in range(2):
        async with running(folder) as broker:
            again = await (await connect(broker, "p")).publish(messages)
            assert codes(again) == [(index, "duplicate") for index in range(5)]
            consumer = await connect(broker, "g", window=10)
            assert len(await consumer.take(5)) == 5
            await consumer.take_nothing(0.05)


@pytest.mark.slow
async def test_a_repeat_is_recognised_after_kill_9(tmp_path: Path) -> None:
    messages = numbered(5)

    async def talk(process: BrokerProcess) -> packets.Receipts:
        stream = await trio.open_tcp_stream(process.host, process.port)
        async with stream:
            client = RawClient(stream)
            await client.hello("p", [fanout("t")])
            return await client.publish(messages)

    async with BrokerProcess(tmp_path) as process:
        assert codes(await talk(process)) == []
        process.kill()
        await trio.to_thread.run_sync(process.start)
        assert codes(await talk(process)) == [(index, "duplicate") for index in range(5)]
