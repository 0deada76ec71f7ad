"""The client and a real broker, in one process and over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from kiteq.broker import serve
from kiteq.config import Settings
from kiteq_client import Client, Message, Received, Refused, Reject, direct, fanout, regex
from tests.support.broker import DISK_FREE_MIN, free_port


@asynccontextmanager
async def served(folder: Path, bind: str = "127.0.0.1:0") -> AsyncIterator[str]:
    settings = Settings(bind=bind, db=f"lmdb://{folder}/store", disk_free_min=DISK_FREE_MIN)
    async with trio.open_nursery() as nursery:
        broker = await nursery.start(partial(serve, settings))
        yield broker.address
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 what the test waits for happens in a handler
            await trio.sleep(0.002)


async def test_every_group_gets_what_it_is_bound_to_in_order(tmp_path: Path) -> None:
    got: dict[str, list[bytes]] = {"one": [], "two": []}

    async def handle(message: Received) -> None:
        got[message.group].append(message.body)

    async with (
        served(tmp_path) as address,
        Client(address, group="one", bindings=[direct("trade", "pay")], on_message=handle),
        Client(address, group="two", bindings=[regex("trade", "pa.*"), fanout("feed")], on_message=handle),
        Client(address, group="shop", topics=["trade", "feed"]) as shop,
    ):
        bodies = [b"%d" % number for number in range(2_000)]
        receipts = await shop.send_many([Message("trade", "pay", body) for body in bodies])
        assert {receipt.groups for receipt in receipts} == {2}
        assert (await shop.send(Message("feed", "any", b"last"))).groups == 1
        assert (await shop.send(Message("feed2", "any"))).groups == 0
        await until(lambda: len(got["one"]) == 2_000 and len(got["two"]) == 2_001)
        assert got == {"one": bodies, "two": [*bodies, b"last"]}


async def test_a_repeated_send_is_a_duplicate(tmp_path: Path) -> None:
    async with served(tmp_path) as address, Client(address, group="shop") as shop:
        message = Message("trade", "pay", b"once")
        assert not (await shop.send(message)).duplicate
        again = await shop.send(message)
        assert (again.duplicate, again.groups) == (True, None)


async def test_a_failed_attempt_comes_again_and_a_rejected_one_does_not(tmp_path: Path) -> None:
    attempts: list[tuple[bytes, int]] = []

    async def handle(message: Received) -> None:
        attempts.append((message.body, message.attempt))
        if message.body == b"rejected":
            raise Reject("never")
        if message.attempt < 3:
            raise ValueError("not yet")

    async with (
        served(tmp_path) as address,
        Client(address, group="g", bindings=[fanout("trade")], on_message=handle) as client,
    ):
        await client.send(Message("trade", "pay", b"rejected"))
        await client.send(Message("trade", "pay", b"third"))
        await until(lambda: (b"third", 3) in attempts)
    assert sorted(attempts) == [(b"rejected", 1), (b"third", 1), (b"third", 2), (b"third", 3)]


async def test_what_was_not_started_waits_for_the_next_client_at_attempt_one(tmp_path: Path) -> None:
    got: list[tuple[bytes, int]] = []

    async def first_only(message: Received) -> None:
        first.set()
        await trio.sleep(0.03)

    async def handle(message: Received) -> None:
        got.append((message.body, message.attempt))

    first = trio.Event()
    async with served(tmp_path) as address:
        async with Client(address, group="g", bindings=[fanout("trade")], on_message=first_only) as client:
            await client.send_many([Message("trade", "pay", b"%d" % number) for number in range(5)])
            await first.wait()
        async with Client(address, group="g", on_message=handle):
            await until(lambda: len(got) == 4)
        assert sorted(got) == [(b"%d" % number, 1) for number in range(1, 5)]


async def test_deliveries_and_unsubscribe(tmp_path: Path) -> None:
    async with (
        served(tmp_path) as address,
        Client(address, group="g", bindings=[direct("trade", "pay")], topics=["trade"]) as client,
    ):
        await client.send_many([Message("trade", "pay", b"%d" % number) for number in range(10)])
        count = 0
        async for delivery in client.deliveries():
            assert delivery.body == b"%d" % count
            await delivery.ack()
            count += 1
            if count == 10:
                break
        await client.unsubscribe(direct("trade", "pay"))
        assert (await client.send(Message("trade", "pay"))).groups == 0


async def test_a_binding_the_broker_refuses_is_refused_on_entering(tmp_path: Path) -> None:
    async with served(tmp_path) as address:
        with pytest.raises(Refused):
            async with Client(address, group="g", bindings=[regex("trade", "(")]):
                raise AssertionError


async def test_a_restart_of_the_broker_is_a_pause(tmp_path: Path) -> None:
    got: list[bytes] = []

    async def handle(message: Received) -> None:
        got.append(message.body)

    address = f"127.0.0.1:{free_port()}"
    async with Client(address, group="g", bindings=[fanout("trade")], on_message=handle, wait=False) as client:
        async with served(tmp_path, address):
            await client.send(Message("trade", "pay", b"before"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, Message("trade", "pay", b"between"))
            await trio.sleep(0.02)
            async with served(tmp_path, address):
                await client.send(Message("trade", "pay", b"after"))
                await until(lambda: len(set(got)) == 3)
                assert client.statistics().reconnects == 1
