"""A group's quota, and receipts that do not wait for the disk."""

from __future__ import annotations

from pathlib import Path

import trio

from kiteq.binding.bindings import direct, fanout
from kiteq.message import Message
from tests.e2e.wire import connect, numbered, running


async def test_topics_that_a_group_over_its_quota_fills_are_refused_until_it_has_consumed(tmp_path: Path) -> None:
    async with running(tmp_path / "db", group_quota=100_000) as broker:
        producer = await connect(broker, "p")
        slow = await connect(broker, "slow", fanout("t"))
        await connect(broker, "other", fanout("elsewhere"))
        await producer.publish([Message("t", "a", b"x" * 30_000) for _ in range(4)])
        with trio.fail_after(10):
            while (receipts := await producer.publish(numbered(1))).exceptions == []:  # noqa: ASYNC110 of the broker
                await trio.sleep(0.1)
        assert receipts.exceptions[0][1] == "group_quota"
        assert "'slow'" in receipts.exceptions[0][2]
        assert (await producer.publish(numbered(1, topic="elsewhere"))).groups == 1
        await slow.credit(100)
        await slow.ack(await slow.take(4))
        with trio.fail_after(10):
            while (await producer.publish(numbered(1, start=9))).exceptions:  # noqa: ASYNC110 of the broker
                await trio.sleep(0.1)


async def test_an_asynchronous_flush_answers_at_once_and_says_so(tmp_path: Path) -> None:
    async with running(tmp_path / "db", flush="async") as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", direct("t", "a"), window=10)
        receipts = await producer.publish(numbered(3))
        assert (receipts.groups, receipts.durable) == (1, False)
        assert [one.number for one in await consumer.take(3)] == [0, 1, 2]
    async with running(tmp_path / "db") as broker:
        consumer = await connect(broker, "g", window=10)
        assert [one.number for one in await consumer.take(3)] == [0, 1, 2]
