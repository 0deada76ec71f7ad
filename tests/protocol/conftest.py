"""One broker for the tests of a module that neither stop nor kill it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.protocol.world import World
from tests.support.broker import BrokerProcess

QUICK = ("--check-after", "0.3", "--check-elsewhere-after", "0.5", "--check-limit", "2", "--half-quota", "40")


@pytest.fixture(scope="module")
def shared_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with BrokerProcess(tmp_path_factory.mktemp("broker"), *QUICK) as process:
        yield process


@pytest.fixture
def world(shared_broker: BrokerProcess) -> Iterator[World]:
    """A world of the shared broker."""
    with World(shared_broker) as one:
        yield one


@pytest.fixture
def own_world(broker: BrokerProcess) -> Iterator[World]:
    """A world of a broker that this test may stop and kill."""
    with World(broker) as one:
        yield one
