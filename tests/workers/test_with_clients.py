"""A set of workers under a program that uses the client, while workers are killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from kiteq_client import Client, Message, Received, direct
from tests.workers.parts import PATIENCE_SECONDS, WorkerSet, running

pytestmark = pytest.mark.slow

ROUNDS = 4
PER_ROUND = 100


async def until(condition: Callable[[], object], what: Callable[[], object]) -> None:
    with trio.move_on_after(2 * PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 what is waited for happens in other tasks and processes
            await trio.sleep(0.01)
        return
    raise AssertionError(what())


async def test_nothing_is_lost_while_workers_are_killed_one_after_the_other(tmp_path: Path) -> None:
    got: Counter[bytes] = Counter()

    async def handle(message: Received) -> None:
        got[message.body] += 1

    used: set[str] = set()
    sent: set[bytes] = set()

    async def send(shop: Client, body: bytes) -> None:
        used.add((await shop.send(Message("trade", "pay", body))).broker)
        sent.add(body)

    async with running(WorkerSet(tmp_path, 3)) as workers:
        address = f"kiteq://{workers.address_of(1)}"
        bindings = [direct("trade", "pay")]
        async with (
            Client(address, group="members", bindings=bindings, on_message=handle) as members,
            Client(address, group="shop", topics=["trade"], timeout=PATIENCE_SECONDS) as shop,
        ):
            for client in (members, shop):
                everywhere = partial(
                    lambda client: set(client.statistics().connected) == set(workers.addresses), client
                )
                await until(everywhere, client.statistics)
            for number in range(ROUNDS):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.to_thread.run_sync, workers.kill_worker, number % workers.count)
                    for at in range(PER_ROUND):
                        nursery.start_soon(send, shop, b"%d-%d" % (number, at))
                await trio.to_thread.run_sync(workers.wait_back, number % workers.count)
            await until(lambda: got.keys() == sent, lambda: (sent - got.keys(), shop.statistics(), workers.log()))
            assert len(used) == workers.count
