"""A registry in memory that a test holds in its hands, and a broker that shares its bindings through it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from kiteq.binding.bindings import Binding, fanout
from kiteq.broker import Broker, serve
from kiteq.config import Settings
from kiteq.errors import Refused
from kiteq.registry.errors import RegistryUnavailable
from kiteq.registry.layout import Server
from kiteq.registry.merging import Key
from kiteq.registry.registry import Registry, Snapshot
from kiteq.registry.state import RegistryState
from kiteq.workers.board import Board
from tests.registry.parts import until
from tests.support.broker import DISK_FREE_MIN

__all__ = ["KEY", "Shelf", "applied", "bound", "joined"]

KEY = ("t", "g")


class Shelf:
    """A registry of one broker; other brokers are what a test does to `board`.

    away: whether nobody reaches it. may_answer: when merging is answered. is_quiet: it tells only what `tell` has it.
    looks: how often the broker has begun to wait for news.
    """

    def __init__(self) -> None:
        self.board = Board()
        self.away = False
        self.is_slow = False
        self.identity = "first"
        self.announced: list[str] = []
        self.publishers: set[Key] = set()
        self.refusal: Refused | None = None
        self.may_answer = trio.Event()
        self.may_answer.set()
        self.is_quiet = False
        self.looks = 0
        self._asked: list[Callable[[], object]] = []
        self._changed = trio.Event()

    @asynccontextmanager
    async def open(self, known: Mapping[Key, Iterable[Binding]]) -> AsyncIterator[Registry]:
        if not self.away and not self.is_slow:
            for key, bindings in known.items():
                self.board.learn(key, bindings)
            self.tell()
        yield self

    def tell(self) -> None:
        """Have the broker look at everything."""
        self._changed.set()

    def come_back(self) -> None:
        """Be reached again; it tells what it holds later."""
        self.away = False
        for asked in self._asked:
            with suppress(Refused):
                asked()
        self._asked.clear()

    def forget_asked(self) -> None:
        """Lose what was asked for meanwhile, as a broker does that is started again."""
        self._asked.clear()

    def patterns(self, key: Key = KEY) -> set[str]:
        return {one.pattern for one in self.board.nodes.get(key, ())}

    @property
    def state(self) -> RegistryState:
        return RegistryState(degraded=self.away, since=0.0, session_over=self.away, reason="away" if self.away else "")

    async def announce(
        self, address: str, _server: Server, _topics: Collection[str] = (), *, timeout: float = 5.0
    ) -> None:
        del timeout
        self._do(partial(self.announced.append, address))

    async def announce_publishers(
        self, _address: str, _server: Server, groups: Iterable[Key], *, timeout: float = 5.0
    ) -> None:
        del timeout
        self.publishers = set(groups)
        self._do(lambda: None)

    async def withdraw(self, *, timeout: float = 5.0) -> None: ...

    async def merge_bindings(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = 5.0
    ) -> None:
        del timeout
        self._do(partial(self.board.merge, (topic, group), list(bindings)))
        await self.may_answer.wait()

    async def remove_binding(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = 5.0
    ) -> None:
        del timeout
        if self.refusal is not None:
            raise self.refusal
        self._do(partial(self.board.remove, (topic, group), list(bindings)))

    async def wait_changed(self) -> Snapshot:
        self.looks += 1
        await self._changed.wait()
        self._changed = trio.Event()
        return Snapshot(dict(self.board.nodes), {}, self.identity)

    def _do(self, asked: Callable[[], object]) -> None:
        if self.away:
            self._asked.append(asked)
            raise RegistryUnavailable("away")
        asked()
        if not self.is_quiet:
            self.tell()


@asynccontextmanager
async def joined(folder: Path, shelf: Shelf, **settings: Any) -> AsyncIterator[Broker]:
    async with trio.open_nursery() as nursery:
        made = Settings(bind="127.0.0.1:0", db=f"lmdb://{folder}", disk_free_min=DISK_FREE_MIN, **settings)
        run = partial(serve, made, open_registry=shelf.open)
        broker: Broker = await nursery.start(run)
        yield broker
        nursery.cancel_scope.cancel()


def bound(broker: Broker, key: Key = KEY) -> set[str]:
    """Return the patterns that are in force."""
    topic, group = key
    outlet = broker.core.deliveries.group(group).outlets.get(topic)
    return set() if outlet is None else {one.pattern for one in outlet.subscription.bindings}


async def applied(broker: Broker, shelf: Shelf) -> None:
    """Wait until the broker has taken all that the registry holds now, twice: the second time it has seen it before."""
    for _ in range(2):
        key = ("u", f"other-{len(shelf.board.nodes)}")
        shelf.board.merge(key, [fanout("u")])
        shelf.tell()
        await until(partial(bound, broker, key))
