"""Fixtures of the end-to-end tests: a folder for a store, a clock, and a broker on both."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kiteq.broker import Broker
from tests.e2e.wire import JumpingClock, RawClient, connect, running


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A store's folder, removed afterwards: each store reserves disk blocks."""
    yield tmp_path / "store"
    shutil.rmtree(tmp_path / "store", ignore_errors=True)


@pytest.fixture
def clock() -> JumpingClock:
    return JumpingClock()


@pytest.fixture
async def server(folder: Path, clock: JumpingClock) -> AsyncIterator[Broker]:
    async with running(folder, clock) as broker:
        yield broker


@pytest.fixture
async def producer(server: Broker) -> RawClient:
    return await connect(server, "producers")
