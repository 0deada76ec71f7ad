"""Workers that clients find through ZooKeeper."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError

from kiteq.binding.bindings import fanout
from kiteq.registry.layout import decode_server
from kiteq.remoting import packets
from tests.cli.running import kiteq
from tests.support.zookeeper import ZooKeeperProcess
from tests.workers.parts import WorkerSet, all_gone, connect, running, until

pytestmark = pytest.mark.slow


def announced(hand: KazooClient, folder: str) -> dict[str, tuple[int, ...]]:
    """Return the partitions of each broker that serves every topic."""
    path = f"/{folder}/kiteq/server/*"
    if hand.exists(path) is None:
        return {}
    found: dict[str, tuple[int, ...]] = {}
    for name in hand.get_children(path):
        with suppress(NoNodeError):  # it has gone meanwhile
            found[name] = decode_server(hand.get(f"{path}/{name}")[0]).partitions
    return found


async def test_each_worker_is_announced_and_shares_its_bindings(tmp_path: Path) -> None:
    with ZooKeeperProcess() as zookeeper:
        hand = KazooClient(zookeeper.address)
        hand.start()
        folder = f"test-{uuid.uuid4().hex[:12]}"
        async with running(WorkerSet(tmp_path, 2, "--zkhost", f"{zookeeper.address}/{folder}")) as workers:
            expected = {address: (number,) for number, address in enumerate(workers.addresses)}
            await trio.to_thread.run_sync(until, lambda: announced(hand, folder) == expected, "both announcements")
            assert f"where clients find these brokers as {' and '.join(workers.addresses)}\n" in workers.log()

            client = await connect(workers.address_of(0), "g", fanout("trade"))
            assert (await client.wait(packets.Brokers)).addresses == workers.addresses
            other = await connect(workers.address_of(1), "producers")
            with trio.fail_after(30):
                while not await other.admin("group.list"):  # noqa: ASYNC110 of another process
                    await trio.sleep(0.02)

            await trio.to_thread.run_sync(workers.kill_worker, 1)
            await trio.to_thread.run_sync(workers.wait_back, 1)
            await trio.to_thread.run_sync(until, lambda: announced(hand, folder) == expected, "it to be announced")
        assert announced(hand, folder) == {}
        hand.stop()
        hand.close()


async def test_a_command_that_names_one_worker_is_about_all(tmp_path: Path) -> None:
    with ZooKeeperProcess() as zookeeper:
        async with running(WorkerSet(tmp_path, 2, "--zkhost", zookeeper.address)) as workers:
            there = ("--broker", workers.address_of(1))
            listed = await trio.to_thread.run_sync(kiteq, tmp_path, "broker", "list", *there)
            assert all(address in listed.stdout for address in workers.addresses)
            # The set can be started again at once: nobody has the ports or the folders any more.
            pids = workers.pids()
            drained = await trio.to_thread.run_sync(kiteq, tmp_path, "broker", "drain", "--wait", *there)
            assert (drained.returncode, drained.stderr) == (0, "")
            assert drained.stdout.startswith("draining the workers ")
            assert all(address in drained.stdout for address in workers.addresses)
            assert all_gone(pids)
