"""One ZooKeeper for the tests of a worker, and a folder in it for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kazoo.client import KazooClient

from tests.support.zookeeper import ZooKeeperProcess


@pytest.fixture(scope="session")
def zookeeper() -> Iterator[ZooKeeperProcess]:
    """A node that tests share; they leave it running."""
    with ZooKeeperProcess() as process:
        yield process


@pytest.fixture
def own_zookeeper() -> Iterator[ZooKeeperProcess]:
    """A node that a test may kill, pause and wipe."""
    with ZooKeeperProcess() as process:
        yield process


@pytest.fixture
def url(zookeeper: ZooKeeperProcess) -> str:
    return f"zk://{zookeeper.address}/test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def hand(url: str, zookeeper: ZooKeeperProcess) -> Iterator[Any]:
    """A client of kazoo in the folder of the test, to look at nodes and to write them by hand."""
    client = KazooClient(zookeeper.address, timeout=10)
    client.start()
    folder = f"/{url.rpartition('/')[2]}"
    client.ensure_path(folder)
    client.chroot = folder
    yield client
    client.stop()
    client.close()
