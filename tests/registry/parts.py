"""What the tests of the registry share: waiting, a log to look at, and the end of a session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import trio
from kazoo.client import KazooClient

from kiteq.registry.layout import Server
from kiteq.registry.registry import Snapshot
from kiteq.registry.session import ZooKeeperSession
from kiteq.registry.zookeeper import ZooKeeperRegistry, open_registry

SESSION_SECONDS = 1.0
WAIT_SECONDS = 20.0
ADDRESS = "127.0.0.1:13800"
SERVER = Server("broker-1", 7, 1)


class ListLog:
    """Keeps what is told."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **values: object) -> None: ...

    def warning(self, event: str, **values: object) -> None:
        self.warnings.append((event, values))

    def named(self) -> list[object]:
        """Return the nodes that were warned about."""
        return [values["node"] for _, values in self.warnings if "node" in values]


def opened(url: str, log: ListLog | None = None, **options: Any) -> AbstractAsyncContextManager[ZooKeeperRegistry]:
    options.setdefault("session_timeout", SESSION_SECONDS)
    options.setdefault("servers_of", None)
    return open_registry(url, log=log or ListLog(), **options)


async def until(holds: Callable[[], object]) -> None:
    """Wait until something becomes true."""
    with anyio.fail_after(WAIT_SECONDS):
        while not holds():  # noqa: ASYNC110 what is waited for happens in another process
            await anyio.sleep(0.01)


async def until_told(registry: ZooKeeperRegistry, holds: Callable[[Snapshot], object]) -> Snapshot:
    """Take snapshots until one is as wanted."""
    with anyio.fail_after(WAIT_SECONDS):
        while True:
            snapshot = await registry.wait_changed()
            if holds(snapshot):
                return snapshot


def session_of(registry: ZooKeeperRegistry) -> ZooKeeperSession:
    return registry._announcements._session


def expire(registry: ZooKeeperRegistry) -> None:
    """End the session of a registry from outside, as ZooKeeper does when it hears nothing for too long."""
    session = session_of(registry)
    client = session._client
    assert client is not None
    twin = KazooClient(session.address.hosts[0], client_id=client.client_id, timeout=10)
    twin.start()
    twin.stop()
    twin.close()


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(function, *arguments)
