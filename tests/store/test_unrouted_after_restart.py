"""What no group was bound to survives restarts, whole and in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import trio

from kiteq.broker import Broker, serve
from kiteq.config import Settings
from kiteq_client import Client, Message, fanout


async def with_broker(folder: Path, work: Callable[[str], Awaitable[None]]) -> None:
    settings = Settings(bind="127.0.0.1:0", db=f"lmdb://{folder}/store")
    async with trio.open_nursery() as nursery:
        broker: Broker = await nursery.start(partial(serve, settings))
        await work(broker.address)
        await broker.drain()


async def test_messages_no_group_was_bound_to_are_not_overwritten_after_a_restart(tmp_path: Path) -> None:
    got: list[str] = []

    async def send(prefix: str, address: str) -> None:
        async with Client(address, group="shop", topics=["trade"]) as shop:
            for number in range(3):  # one by one, so that each is a record of its own
                assert (await shop.send(Message("trade", "pay", f"{prefix}{number}"))).groups == 0

    async def take(address: str) -> None:
        async with Client(address, group="late", bindings=[fanout("trade", start="first")]) as client:
            with trio.fail_after(5):
                async for delivery in client.deliveries():
                    got.append(delivery.text)
                    await delivery.ack()
                    if len(got) == 6:
                        break

    await with_broker(tmp_path, partial(send, "a"))
    await with_broker(tmp_path, partial(send, "b"))
    await with_broker(tmp_path, take)
    assert got == ["a0", "a1", "a2", "b0", "b1", "b2"]
