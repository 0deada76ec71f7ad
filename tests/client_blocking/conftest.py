"""One broker for all these tests, and the rule that no client leaves threads or descriptors behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client_blocking.parts import Place, until
from tests.support.broker import BrokerProcess


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with BrokerProcess(tmp_path_factory.mktemp("broker")) as process:
        yield process


@pytest.fixture
def place(server: BrokerProcess, request: pytest.FixtureRequest) -> Place:
    """A topic and a group of this test alone."""
    name = f"{request.node.originalname}-{time.monotonic_ns()}"
    return Place(server.address, topic=name, group=name)


def client_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kiteq-")]


def sockets() -> set[str]:
    """Return the sockets and selectors this process has open."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = str(path.readlink())
        except FileNotFoundError:
            continue  # that of the listing itself
        if target.startswith(("socket:", "anon_inode:[eventpoll]")):
            found.add(f"{path.name} {target}")
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left(server: BrokerProcess) -> Iterator[None]:
    before = sockets()
    yield
    until(lambda: not client_threads(), lambda: f"threads left: {client_threads()}")
    until(lambda: sockets() <= before, lambda: f"descriptors left: {sockets() - before}")
