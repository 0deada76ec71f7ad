"""A worker's registry, whose other end is the process that runs the workers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Final

import trio

from kiteq.binding.bindings import Binding, from_wire, to_wire
from kiteq.errors import Refused
from kiteq.registry.errors import RegistryUnavailable
from kiteq.registry.layout import Server
from kiteq.registry.merging import Key
from kiteq.registry.registry import Registry, Snapshot
from kiteq.registry.state import RegistryState
from kiteq.workers.channel import NODES_PER_MESSAGE, Channel, Message

__all__ = ["SharedRegistry"]

TIMEOUT_SECONDS: Final = 5.0
WAITING_MAX: Final = 10_000
"""Requests that wait for a process that does not answer; more are refused, and its clients try again."""


@dataclass(eq=False, slots=True)
class _Request:
    key: Key
    answered: trio.Event
    refusal: Refused | None = None


class SharedRegistry:
    """What the workers of a set share; a `kiteq.registry.registry.Registry`."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._nodes: dict[Key, tuple[Binding, ...]] = {}
        self._numbers = count(1)
        self._waiting: dict[int, _Request] = {}
        self._unanswered: Counter[Key] = Counter()
        self._told_unknown: set[Key] = set()
        self._changed = trio.Event()
        self._opened = trio.Event()
        self._started = time.monotonic()
        self._lost_at: float | None = None

    # --- what the other end says -------------------------------------------------------------

    def take(self, message: Message) -> None:
        """Take a message of the process that runs the workers; those that are not about the registry are ignored."""
        match message:
            case ("nodes", nodes):
                for topic, group, wire in nodes:
                    self._take_node((topic, group), wire)
                self._changed.set()
            case ("opened",):
                self._opened.set()
                self._changed.set()
            case ("done", request, code, reason):
                self._take_answer(request, None if code is None else Refused(code, reason))
            case _:
                pass

    def lost(self) -> None:
        """Note that nobody is at the other end any more."""
        self._lost_at = time.monotonic()

    def _take_node(self, key: Key, wire: Sequence[Sequence[object]] | None) -> None:
        if wire is None:
            self._nodes.pop(key, None)
        else:
            self._nodes[key] = tuple(from_wire(fields) for fields in wire)

    def _take_answer(self, number: int, refusal: Refused | None) -> None:
        request = self._waiting.pop(number)
        request.refusal = refusal
        request.answered.set()
        key = request.key
        self._unanswered[key] -= 1
        if not self._unanswered[key]:
            del self._unanswered[key]
            if key in self._told_unknown:
                self._changed.set()

    # --- what the broker asks ----------------------------------------------------------------

    @asynccontextmanager
    async def open(self, known: Mapping[Key, Iterable[Binding]]) -> AsyncIterator[Registry]:
        """Tell what the store knows, and enter when this worker knows what the others do. See `OpenRegistry`."""
        rows = [(topic, group, [to_wire(one) for one in bindings]) for (topic, group), bindings in known.items()]
        for start in range(0, len(rows), NODES_PER_MESSAGE):
            self._channel.post("known", rows[start : start + NODES_PER_MESSAGE])
        self._channel.post("open")
        with trio.move_on_after(TIMEOUT_SECONDS):
            await self._opened.wait()
        yield self

    @property
    def state(self) -> RegistryState:
        """Whether the process that runs the workers is there, and has said what the other workers know."""
        if self._lost_at is not None:
            reason = "the process that runs the workers has ended"
            return RegistryState(degraded=True, since=self._lost_at, session_over=True, reason=reason)
        reason = "" if self._opened.is_set() else "the process that runs the workers has not answered yet"
        return RegistryState(degraded=bool(reason), since=self._started, session_over=False, reason=reason)

    async def announce(
        self, address: str, server: Server, topics: Collection[str] = (), *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Do nothing: the process that runs the workers knows that this one is ready, and has clients told."""

    async def announce_publishers(
        self, address: str, server: Server, groups: Iterable[Key], *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Do nothing: a person who asks any of the workers who publishes sees it there."""

    async def withdraw(self, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Do nothing, as for `announce`."""

    async def merge_bindings(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Add or update bindings. Raises `Refused` for a contradiction, and `RegistryUnavailable`."""
        await self._ask("merge", (topic, group), bindings, timeout)

    async def remove_binding(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Remove bindings of the same kind and pattern. Raises `RegistryUnavailable`."""
        await self._ask("remove", (topic, group), bindings, timeout)

    async def wait_changed(self) -> Snapshot:
        """Wait until there is something that was not returned here before; return all of it.

        A node about which a request of this worker is not answered is None: what it holds is old.
        """
        await self._changed.wait()
        self._changed = trio.Event()
        self._told_unknown = set(self._unanswered)
        return Snapshot({**self._nodes, **dict.fromkeys(self._unanswered)}, {})

    async def _ask(self, verb: str, key: Key, bindings: Iterable[Binding], timeout: float) -> None:
        if self._lost_at is not None or len(self._waiting) >= WAITING_MAX:
            raise RegistryUnavailable(self.state.reason or "the process that runs the workers does not answer")
        number = next(self._numbers)
        request = self._waiting[number] = _Request(key, trio.Event())
        self._unanswered[key] += 1
        topic, group = key
        self._channel.post(verb, number, topic, group, [to_wire(one) for one in bindings])
        with trio.move_on_after(timeout):
            await request.answered.wait()
        if not request.answered.is_set():
            raise RegistryUnavailable(f"the process that runs the workers has not answered within {timeout:g} s")
        if request.refusal is not None:
            raise request.refusal
