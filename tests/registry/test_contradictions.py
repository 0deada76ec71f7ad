"""Bindings that were changed at several brokers at once, and contradict each other: nothing else is lost by it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import Binding, direct
from tests.e2e.wire import RawClient, connect, numbered
from tests.registry.parts import until
from tests.registry.shelf import KEY, Shelf, applied, bound, joined

pytestmark = pytest.mark.slow


class Gate(Shelf):
    """Lets a test hold up what the broker tells of the group "first"."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = trio.Event()
        self.go_on = trio.Event()
        self.is_closed = False

    async def merge_bindings(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = 5.0
    ) -> None:
        if self.is_closed and group == "first":
            self.reached.set()
            await self.go_on.wait()
        await super().merge_bindings(group, topic, bindings, timeout=timeout)

    async def hold_up(self) -> None:
        """Be reached again, without what was asked for meanwhile, and wait until the first group is told of."""
        self.forget_asked()
        self.is_closed = True
        self.come_back()
        self.tell()
        await self.reached.wait()


async def owed_one(broker_client: RawClient) -> bool:
    return bool((await broker_client.row("g"))["pending"] == 1)


async def test_a_change_made_in_an_outage_that_is_refused_takes_back_the_change_and_not_the_binding(
    tmp_path: Path,
) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        client = await connect(broker, "g", direct("t", "a"))
        await client.publish(numbered(1))
        await applied(broker, shelf)
        shelf.away = True
        await connect(broker, "g", direct("t", "a", watermark=10))
        shelf.board.merge(KEY, [direct("t", "b")])
        shelf.come_back()
        shelf.tell()
        await until(lambda: bound(broker) == {"a", "b"})
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"a", "b"}, {"a", "b"})
        assert broker.core.router.submitted("g", "t") == shelf.board.nodes[KEY]
        assert await owed_one(client)


async def test_what_replaces_a_binding_elsewhere_is_in_force_at_once_though_it_contradicts_the_old_one(
    tmp_path: Path,
) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        await connect(broker, "g", direct("t", "a"))
        await applied(broker, shelf)
    shelf.board.remove(KEY, [direct("t", "a")])
    shelf.board.merge(KEY, [direct("t", "b", watermark=10)])
    async with joined(tmp_path, shelf) as broker:
        assert bound(broker) == {"b"}


async def test_what_replaced_a_binding_here_without_a_registry_replaces_it_there(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        client = await connect(broker, "g", direct("t", "a"))
        await applied(broker, shelf)
        shelf.away = True
        await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="a")
        client = await connect(broker, "g", direct("t", "b", watermark=10))
        await client.publish(numbered(1, message_type="b"))
    shelf.forget_asked()
    async with joined(tmp_path, shelf) as broker:
        shelf.come_back()
        shelf.tell()
        await until(lambda: shelf.patterns() == {"b"})
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"b"}, {"b"})
        assert await owed_one(await connect(broker, "g"))


async def test_what_is_bound_again_while_its_removal_is_told_stays_bound(tmp_path: Path) -> None:
    shelf = Gate()
    async with joined(tmp_path, shelf) as broker:
        await connect(broker, "first", direct("t", "a"))  # groups are told of in the order in which they came
        client = await connect(broker, "g", direct("t", "a"))
        await applied(broker, shelf)
        shelf.away = True
        await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="a")
        await connect(broker, "first", direct("t", "x"))
        await shelf.hold_up()
        await connect(broker, "g", direct("t", "a"))
        assert bound(broker) == {"a"}
        shelf.go_on.set()
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"a"}, {"a"})


async def test_what_is_removed_while_it_is_told_stays_removed(tmp_path: Path) -> None:
    shelf = Gate()
    async with joined(tmp_path, shelf) as broker:
        await connect(broker, "first", direct("t", "a"))
        client = await connect(broker, "g", direct("t", "b"))
        await applied(broker, shelf)
        shelf.away = True
        await connect(broker, "first", direct("t", "x"))
        await connect(broker, "g", direct("t", "a"))
        await shelf.hold_up()
        await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="a")
        shelf.go_on.set()
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"b"}, {"b"})
