"""How a client finds brokers: under both loops, and with nothing of the broker loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import anyio
import pytest

from kiteq.registry.directory import open_directory
from kiteq.registry.layout import Server, encode_server
from tests.client.peer import both_loops
from tests.registry.parts import ADDRESS, SERVER, ListLog, in_thread, opened, until
from tests.support.broker import free_port
from tests.support.zookeeper import ZooKeeperProcess
from tests.test_tidy import ROOT

pytestmark = pytest.mark.slow

OTHER = Server("broker-2", 1, 1)


def announce(hand: Any, topic: str, address: str, server: Server) -> None:
    hand.create(f"/kiteq/server/{topic}/{address}", encode_server(server), ephemeral=True, makepath=True)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_brokers_are_found_as_they_come_and_go(url: str, hand: Any, backend: str) -> None:
    async def find() -> None:
        async with open_directory(url, ["t"], log=ListLog(), session_timeout=1.0) as directory:
            assert directory.servers_of("t") == {}
            await directory.wait_changed()
            announce(hand, "t", ADDRESS, SERVER)
            with anyio.fail_after(1):
                assert await directory.wait_changed() == {"*": {}, "t": {ADDRESS: SERVER}}
            announce(hand, "*", "h:1", OTHER)
            with anyio.fail_after(1):
                await directory.wait_changed()
            assert directory.servers_of("t") == {ADDRESS: SERVER, "h:1": OTHER}
            assert directory.servers_of("u") == {"h:1": OTHER}
            hand.delete(f"/kiteq/server/t/{ADDRESS}")
            with anyio.fail_after(1):
                while directory.servers_of("t") != {"h:1": OTHER}:
                    await directory.wait_changed()
            assert not directory.state.degraded

    anyio.run(find, backend=backend)


@both_loops
async def test_an_exception_of_the_block_leaves_as_itself() -> None:
    with pytest.raises(KeyError):
        async with open_directory(f"zk://127.0.0.1:{free_port()}", ["t"], log=ListLog(), timeout=0.1) as directory:
            assert directory.servers_of("t") is None
            assert directory.state.degraded
            raise KeyError


async def test_the_last_known_brokers_stay_known_in_an_outage(own_zookeeper: ZooKeeperProcess) -> None:
    url = f"zk://{own_zookeeper.address}"
    async with opened(url) as registry, open_directory(url, None, log=ListLog(), session_timeout=1.0) as directory:
        await registry.announce(ADDRESS, SERVER, ["t"])
        await until(lambda: directory.servers_of("t") == {ADDRESS: SERVER})
        own_zookeeper.kill()
        await until(lambda: directory.state.session_over)
        assert directory.servers_of("t") == {ADDRESS: SERVER}
        await in_thread(own_zookeeper.start)
        await until(lambda: not directory.state.degraded)
        await until(lambda: directory.servers_of("t") == {ADDRESS: SERVER})


def test_finding_brokers_under_asyncio_loads_nothing_of_the_broker(url: str, hand: Any) -> None:
    announce(hand, "t", ADDRESS, SERVER)
    program = f"""
import asyncio, logging, sys
async def main():
    from kiteq.registry.directory import open_directory
    from kiteq.registry.log import StandardLog
    async with open_directory({url!r}, ["t"], log=StandardLog(logging.getLogger("kiteq_client"))) as directory:
        print(list(directory.servers_of("t")))
        names = ("lmdb", "typer", "structlog", "re2", "trio", "kiteq.config", "kiteq.logs", "kiteq.store", "kiteq.pipe")
        print([name for name in names if name in sys.modules])
asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "client")))}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (result.stdout, result.stderr) == (f"{[ADDRESS]}\n[]\n", "")
