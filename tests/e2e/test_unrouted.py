"""Messages no group is bound to, and the groups that ask for the first ones."""

from __future__ import annotations

from pathlib import Path

import trio

from kiteq.binding.bindings import direct, fanout
from kiteq.broker import Broker
from kiteq.remoting import packets
from tests.e2e.wire import RawClient, connect, numbered, running


async def test_a_receipt_says_when_no_group_is_bound(server: Broker, producer: RawClient) -> None:
    receipts = await producer.publish(numbered(2))
    assert (receipts.groups, receipts.durable, receipts.exceptions) == (0, True, [])


async def test_a_group_that_wants_the_first_gets_what_was_kept_in_order_and_others_do_not(
    server: Broker, producer: RawClient
) -> None:
    for number in range(20):
        await producer.publish(numbered(1, message_type="ab"[number % 2], start=number))
    latest = await connect(server, "latest", fanout("t"), window=100)
    first = await connect(server, "first", fanout("t", start="first"), window=100)
    only = await connect(server, "only", direct("t", "b", start="first"), window=100)
    await producer.publish(numbered(2, start=20))
    assert [one.number for one in await first.take(22)] == list(range(22))
    assert [one.number for one in await only.take(10)] == list(range(1, 20, 2))
    assert [one.number for one in await latest.take(2)] == [20, 21]
    await only.take_nothing(0.05)


async def test_what_was_kept_survives_restarts_and_new_messages(folder: Path) -> None:
    for start in range(0, 9, 3):
        async with running(folder) as broker:
            producer = await connect(broker, "p")
            for number in range(start, start + 3):
                await producer.publish(numbered(1, start=number))
    async with running(folder) as broker:
        first = await connect(broker, "first", fanout("t", start="first"))
    async with running(folder) as broker:
        first = await connect(broker, "first", window=100)
        assert [one.number for one in await first.take(9)] == list(range(9))
        await first.take_nothing(0.05)


async def test_nothing_is_missed_or_doubled_while_a_group_binds_under_load(server: Broker) -> None:
    producer = await connect(server, "p")
    sent = 0
    bound = trio.Event()

    async def publish() -> None:
        nonlocal sent
        while not bound.is_set() or sent < 200:
            await producer.send(*[packets.Publish(1, [numbered(1, start=sent + n)[0].encoded()]) for n in range(4)])
            sent += 4
            await producer.wait(packets.Receipts)
        for _ in range(3 * sent // 4):
            await producer.wait(packets.Receipts)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        await trio.sleep(0.02)
        first = await connect(server, "first", fanout("t", start="first"), window=10_000)
        bound.set()
    assert [one.number for one in await first.take(sent)] == list(range(sent))
    await first.take_nothing(0.05)
