"""A client whose brokers are announced by the test, in place of a ZooKeeper that it would have to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from kiteq.registry.layout import Server
from kiteq_client import Client
from kiteq_client.announced import Announced

__all__ = ["announce", "finding_client"]


class _Told(Announced):
    """Learns what `announce` says."""

    async def run(self, _changed: Callable[[], None]) -> None:
        await anyio.sleep_forever()


@contextmanager
def finding_client(**arguments: Any) -> Iterator[Client]:
    """Make a client that knows of no broker yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kiteq_client.client.Announced", _Told)
        client = Client("zk://127.0.0.1:1", wait=False, **{"group": "g"} | arguments)
    yield client


def announce(client: Client, *brokers: tuple[str, Server, tuple[str, ...]]) -> None:
    """Say which brokers there are now: address, what they say of themselves, topics."""
    servers: dict[str, dict[str, Server]] = {}
    for address, server, topics in brokers:
        for topic in topics:
            servers.setdefault(topic, {})[address] = server
    members = client._brokers.members
    assert isinstance(members, _Told)
    members._learn(servers)
    client._brokers.refresh()
