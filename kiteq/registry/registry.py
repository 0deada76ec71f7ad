"""What a broker needs of a registry, whichever it is: ZooKeeper, or the process that runs several workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from kiteq.binding.bindings import Binding
from kiteq.registry.layout import Server, ServerMap
from kiteq.registry.merging import Key
from kiteq.registry.state import RegistryState

__all__ = ["OpenRegistry", "Registry", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the registry holds.

    bindings: by topic and group. None: nothing is known of this node now. A key that is missing means
    nothing either. A list that lacks a binding means that somebody removed it.
    servers: by topic ("*": every topic) and address.
    identity: another one after the registry was wiped, or when it is another registry than before.
    """

    bindings: Mapping[Key, tuple[Binding, ...] | None]
    servers: ServerMap
    identity: str = ""


class Registry(Protocol):
    """A broker's part in the registry.

    Every method that waits raises `RegistryUnavailable` when the registry does not answer within `timeout`
    seconds. What it was called for is kept all the same, and done when the registry is back.
    """

    @property
    def state(self) -> RegistryState:
        """Whether the registry is as it should be, since when not and why."""

    async def announce(
        self, address: str, server: Server, topics: Collection[str] = (), *, timeout: float = ...
    ) -> None:
        """Say that the broker at HOST:PORT serves these topics, or every topic. Raises `AddressTaken` too."""

    async def announce_publishers(
        self, address: str, server: Server, groups: Iterable[Key], *, timeout: float = ...
    ) -> None:
        """Say which groups publish what through this broker, as (topic, group); instead of what was said before."""

    async def withdraw(self, *, timeout: float = ...) -> None:
        """Take back what was announced."""

    async def merge_bindings(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = ...
    ) -> None:
        """Add or update bindings. Raises `Refused` for a contradiction, and `UnreadableNode`, too."""

    async def remove_binding(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = ...
    ) -> None:
        """Remove bindings of the same kind and pattern."""

    async def wait_changed(self) -> Snapshot:
        """Wait until the registry holds something else than what was returned here last; return all of it."""


OpenRegistry = Callable[[Mapping[Key, Iterable[Binding]]], AbstractAsyncContextManager[Registry]]
"""Opens a registry, given the bindings that the store knows, by topic and group."""
