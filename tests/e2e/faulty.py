"""A broker whose store is slow, or has no room."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import trio

from kiteq.broker import Broker
from kiteq.errors import StoreFull
from kiteq.store.tables import Row, Table


def codes(exceptions: list[list[object]]) -> list[tuple[object, object]]:
    return [(exception[0], exception[1]) for exception in exceptions]


@contextmanager
def held_disk(broker: Broker) -> Iterator[None]:
    """Let no commit end before the block does."""
    tables, go_on = broker.core.store.tables, threading.Event()
    apply = tables.apply

    def wait(rows: list[Row]) -> None:
        go_on.wait(10)
        apply(rows)

    try:
        with patch.object(tables, "apply", wait):
            yield
    finally:
        go_on.set()


@contextmanager
def held_reads(broker: Broker, name: str) -> Iterator[threading.Event]:
    """Let no call of `get` or `scan` of the tables end before the block does; return what tells that one has begun."""
    tables, begun, go_on = broker.core.store.tables, threading.Event(), threading.Event()
    read = getattr(tables, name)

    def wait(*arguments: Any, **more: Any) -> Any:
        begun.set()
        go_on.wait(10)
        return read(*arguments, **more)

    try:
        with patch.object(tables, name, wait):
            yield begun
    finally:
        go_on.set()


@contextmanager
def full_store(broker: Broker) -> Iterator[None]:
    """Let the store have no room for messages, but for what is less."""
    tables = broker.core.store.tables
    apply = tables.apply

    def refuse(rows: list[Row]) -> None:
        if any(value is not None and table in (Table.HALF, Table.LOG, Table.UNROUTED) for table, _, value in rows):
            raise StoreFull("no room")
        apply(rows)

    with patch.object(tables, "apply", refuse):
        yield


async def nothing_moves(broker: Broker) -> None:
    """Wait until what was sent was read."""
    await trio.sleep(0.05)
