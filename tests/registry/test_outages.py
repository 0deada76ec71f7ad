"""A ZooKeeper that dies, stands still or forgets everything: nothing waits for it, and all is filled in again."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import pytest
import trio

from kiteq.binding.bindings import direct, fanout
from kiteq.registry.errors import RegistryUnavailable
from kiteq.registry.zookeeper import ZooKeeperRegistry
from tests.registry.parts import ADDRESS, SERVER, SESSION_SECONDS, in_thread, opened, session_of, until, until_told
from tests.support.zookeeper import Ensemble, ZooKeeperProcess

pytestmark = pytest.mark.slow

A, B = direct("t", "a"), direct("t", "b")
KEY = ("t", "g")
FOUND = {"t": {ADDRESS: SERVER}}


async def fill(registry: ZooKeeperRegistry) -> None:
    await registry.announce(ADDRESS, SERVER, ["t"])
    await registry.merge_bindings("g", "t", [A])


async def seen_by_another(url: str) -> None:
    """Check that a registry that comes new finds everything."""
    async with opened(url) as other:
        await until_told(other, lambda snapshot: snapshot.bindings == {KEY: (A, B)} and snapshot.servers == FOUND)


async def refused_soon(ask: Callable[[], Awaitable[None]], seconds: float) -> None:
    start = time.monotonic()
    with pytest.raises(RegistryUnavailable):
        await ask()
    assert time.monotonic() - start < seconds


@pytest.mark.parametrize("wiped", [False, True], ids=["data-kept", "data-wiped"])
@pytest.mark.parametrize("seconds", [0.0, 1.5 * SESSION_SECONDS], ids=["short", "longer-than-the-session"])
async def test_all_is_there_again_after_an_outage(own_zookeeper: ZooKeeperProcess, wiped: bool, seconds: float) -> None:
    url = f"zk://{own_zookeeper.address}/a"
    async with opened(url) as registry:
        await fill(registry)
        own_zookeeper.kill()
        await until(lambda: registry.state.degraded)
        await refused_soon(lambda: registry.merge_bindings("g", "t", [B]), 0.5)
        await trio.sleep(seconds)
        if seconds:
            assert registry.state.session_over
        assert "no connection to" in registry.state.reason
        if wiped:
            own_zookeeper.wipe()
        await in_thread(own_zookeeper.start)
        await until(lambda: not registry.state.degraded)
        await until_told(registry, lambda snapshot: snapshot.bindings == {KEY: (A, B)} and snapshot.servers == FOUND)
        await seen_by_another(url)


async def test_a_session_survives_a_restart_of_zookeeper(own_zookeeper: ZooKeeperProcess) -> None:
    # A node that is starting may take a connection and never answer it. kazoo waits for the session timeout, shared out
    # among the hosts: with two names the next try still finds the session alive.
    url = f"zk://{own_zookeeper.address},localhost:{own_zookeeper.port}"
    async with opened(url, session_timeout=10.0) as registry:
        await fill(registry)
        session = session_of(registry).session_id
        own_zookeeper.kill()
        await until(lambda: registry.state.degraded)
        assert not registry.state.session_over
        await in_thread(own_zookeeper.start)
        await until(lambda: not registry.state.degraded)
        assert session_of(registry).session_id == session


async def test_a_zookeeper_that_stands_still_is_noticed_and_used_again(own_zookeeper: ZooKeeperProcess) -> None:
    url = f"zk://{own_zookeeper.address}"
    async with opened(url) as registry:
        await fill(registry)
        own_zookeeper.pause()
        start = time.monotonic()
        await refused_soon(lambda: registry.merge_bindings("g", "t", [B], timeout=0.3), 0.6)
        await until(lambda: registry.state.session_over)
        assert time.monotonic() - start < 4 * SESSION_SECONDS
        own_zookeeper.resume()
        await until(lambda: not registry.state.degraded)
        await seen_by_another(url)


async def test_a_registry_that_stands_still_does_not_hold_up_the_end(own_zookeeper: ZooKeeperProcess) -> None:
    async with opened(f"zk://{own_zookeeper.address}", session_timeout=10.0) as registry:
        await fill(registry)
        own_zookeeper.pause()
        start = time.monotonic()
    assert time.monotonic() - start < 3
    own_zookeeper.resume()


async def test_what_is_asked_for_without_a_registry_is_done_when_there_is_one() -> None:
    zookeeper = ZooKeeperProcess()
    try:
        start = time.monotonic()
        async with opened(f"zk://{zookeeper.address}/a", known={("t", "old"): [fanout("t")]}, timeout=0.2) as registry:
            assert time.monotonic() - start < 1
            assert registry.state.degraded
            assert registry.state.session_over
            for ask in (
                lambda: registry.announce(ADDRESS, SERVER, ["t"], timeout=0.2),
                lambda: registry.merge_bindings("g", "t", [A, B], timeout=0.2),
                lambda: registry.remove_binding("g", "t", [B], timeout=0.2),
            ):
                await refused_soon(ask, 0.5)
            await in_thread(zookeeper.start)
            await until_told(
                registry,
                lambda snapshot: (
                    snapshot.servers == FOUND and snapshot.bindings == {KEY: (A,), ("t", "old"): (fanout("t"),)}
                ),
            )
    finally:
        zookeeper.close()


async def test_the_timeout_that_was_agreed_on_counts(own_zookeeper: ZooKeeperProcess) -> None:
    async with opened(f"zk://{own_zookeeper.address}", session_timeout=0.1) as registry:
        assert session_of(registry).session_timeout == pytest.approx(0.5)  # the least that the node allows
        await fill(registry)


async def test_the_leader_of_an_ensemble_dies() -> None:
    ensemble = await in_thread(lambda: Ensemble().__enter__())
    try:
        url = f"zk://{ensemble.address}/a"
        async with opened(url, session_timeout=4.0) as registry, opened(url, session_timeout=4.0) as other:
            await fill(registry)
            leader = await in_thread(ensemble.leader)
            leader.kill()
            await until(lambda: registry.state.degraded or other.state.degraded)
            await until(lambda: not registry.state.degraded and not other.state.degraded)
            await registry.merge_bindings("g", "t", [B], timeout=20.0)
            await until_told(other, lambda snapshot: snapshot.bindings == {KEY: (A, B)} and snapshot.servers == FOUND)
            [left, last] = [node for node in ensemble.nodes if node.is_running]
            left.kill()
            await until(lambda: registry.state.degraded and other.state.degraded)  # no quorum is left
            await in_thread(ensemble.start)
            await until(lambda: not registry.state.degraded)
            await seen_by_another(url)
            assert last.is_running
    finally:
        ensemble.close()
