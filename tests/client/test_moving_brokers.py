"""Real brokers behind a real ZooKeeper that drain, die and return while programs send and consume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest

from kiteq_client import Client, Message, Received, direct
from tests.client.ledger import warnings
from tests.support.broker import BrokerProcess
from tests.support.zookeeper import ZooKeeperProcess

pytestmark = pytest.mark.slow

SECONDS_MAX = 60.0


@pytest.fixture(scope="module")
def zookeeper() -> Iterator[ZooKeeperProcess]:
    with ZooKeeperProcess() as process:
        yield process


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(SECONDS_MAX / 2):
        while not condition():  # noqa: ASYNC110 what is waited for happens in other processes
            await anyio.sleep(0.01)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_rolling_restart_is_no_error_for_anybody(tmp_path: Path, zookeeper: ZooKeeperProcess, loop: str) -> None:
    url = f"zk://{zookeeper.address}/{loop}"
    brokers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        brokers.append(BrokerProcess(tmp_path / name, "--topics", "trade", "--zkhost", url))
    with ExitStack() as stack:
        for broker in brokers:
            stack.callback(broker.close)
            broker.start()
        anyio.run(_roll, url, brokers, backend=loop)


async def _roll(url: str, brokers: list[BrokerProcess]) -> None:
    got: set[bytes] = set()
    sent: set[bytes] = set()
    committed: set[bytes] = set()
    by: dict[str, int] = {}
    done = anyio.Event()

    async def handle(message: Received) -> None:
        got.add(message.id)

    async def produce(client: Client) -> None:
        while not done.is_set():
            for receipt in await client.send_many(Message("trade", "pay", b"x") for _ in range(20)):
                sent.add(receipt.message_id)
                by[receipt.broker] = by.get(receipt.broker, 0) + 1
            await anyio.sleep(0.002)

    async def transact(client: Client) -> None:
        while not done.is_set():
            async with client.transaction(Message("trade", "pay", b"tx"), confirm=True) as tx:
                await anyio.sleep(0.002)
            committed.add(tx.id)

    with anyio.fail_after(SECONDS_MAX), warnings() as warned:
        async with (
            Client(url, group="readers", bindings=[direct("trade", "pay")], on_message=handle) as reader,
            Client(url, group="shop", topics=["trade"], timeout=20) as client,
        ):
            await until(lambda: len(client.statistics().connected) == len(reader.statistics().connected) == 2)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(produce, client)
                tasks.start_soon(transact, client)
                for broker in brokers:
                    await until(lambda: len(by) == 2)
                    await anyio.to_thread.run_sync(broker.stop)
                    await until(lambda: len(client.statistics().connected) == 1)
                    await anyio.to_thread.run_sync(broker.start)
                    await until(lambda: len(client.statistics().connected) == len(reader.statistics().connected) == 2)
                    by.clear()
                # Killed, what it has not answered is sent to it again when it is back.
                await until(lambda: len(by) == 2)
                assert warned == []
                brokers[0].kill()
                await until(lambda: len(client.statistics().connected) == 1)
                await anyio.to_thread.run_sync(brokers[0].start)
                await until(lambda: len(client.statistics().connected) == len(reader.statistics().connected) == 2)
                by.clear()
                await until(lambda: len(by) == 2)
                done.set()
            await until(lambda: sent | committed <= got)
            assert client.statistics().pending_decisions == 0


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_broker_that_is_frozen_does_not_hold_up_the_others(
    tmp_path: Path, zookeeper: ZooKeeperProcess, loop: str
) -> None:
    url = f"zk://{zookeeper.address}/frozen-{loop}"
    brokers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        brokers.append(BrokerProcess(tmp_path / name, "--topics", "trade", "--zkhost", url))

    async def send() -> None:
        async with Client(url, group="shop", topics=["trade"], timeout=30) as client:
            await until(lambda: len(client.statistics().connected) == 2)
            with anyio.fail_after(SECONDS_MAX):
                await client.send_many(Message("trade", "pay") for _ in range(1_000))
                os.kill(brokers[0].pid, signal.SIGSTOP)
                try:
                    receipts: list[str] = []

                    async def one() -> None:
                        receipts.append((await client.send(Message("trade", "pay"))).broker)

                    async with anyio.create_task_group() as tasks:
                        for _ in range(3_000):
                            tasks.start_soon(one)
                        await until(lambda: len(receipts) >= 2_500)
                        os.kill(brokers[0].pid, signal.SIGCONT)
                finally:
                    os.kill(brokers[0].pid, signal.SIGCONT)
                assert len(receipts) == 3_000

    with ExitStack() as stack:
        for broker in brokers:
            stack.callback(broker.close)
            broker.start()
        anyio.run(send, backend=loop)
