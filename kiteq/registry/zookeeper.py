"""The registry in ZooKeeper, as a broker uses it.

    async with open_registry("zk://127.0.0.1:2181", known=bindings_of_the_store) as registry:
        snapshot = await registry.wait_changed()
        await registry.announce("127.0.0.1:13800", broker_id, epoch, topics)
        await registry.merge_bindings("billing", "trade", [direct("trade", "pay-succ")])

No outage raises out of the block or holds it up. What was asked for meanwhile is done afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from kiteq.binding.bindings import Binding
from kiteq.limits import ZK_SESSION_SECONDS
from kiteq.registry.announcements import Announcements
from kiteq.registry.attachment import Attachment
from kiteq.registry.errors import AddressTaken, RegistryUnavailable
from kiteq.registry.keeper import Keeper
from kiteq.registry.layout import EVERY_TOPIC, PUBLISHERS, ROOT, SERVERS, Server, publisher_path, server_path
from kiteq.registry.log import Log
from kiteq.registry.merging import Change, Key, merging, removing
from kiteq.registry.registry import Snapshot
from kiteq.registry.servers import Servers
from kiteq.registry.session import ZooKeeperSession
from kiteq.registry.state import RegistryState
from kiteq.registry.subscriptions import Subscriptions
from kiteq.registry_address import Credentials, parse_registry_url

__all__ = ["ZooKeeperRegistry", "open_registry"]

TIMEOUT_SECONDS: Final = 5.0


class ZooKeeperRegistry:
    """A broker's part in the registry; `open_registry` makes one.

    Every method that waits raises `RegistryUnavailable` when the registry does not answer in time. What it
    was called for is kept all the same, and done when the registry is back.
    """

    def __init__(
        self,
        attachment: Attachment[Snapshot],
        subscriptions: Subscriptions,
        servers: Servers,
        announcements: Announcements,
    ) -> None:
        self._attachment = attachment
        self._subscriptions = subscriptions
        self._servers = servers
        self._announcements = announcements
        self._unconfirmed: dict[Key, int] = {}

    @property
    def state(self) -> RegistryState:
        """Whether the registry is as it should be, since when not and why."""
        return self._attachment.state()

    async def announce(
        self, address: str, server: Server, topics: Collection[str] = (), *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Say that the broker at HOST:PORT serves these topics, or every topic; instead of what was said before.

        Kept up through lost sessions. Raises `RegistryUnavailable`, and `AddressTaken` when another broker's
        announcement is still there after `timeout`; when that goes, ours is made.
        """
        nodes = {server_path(topic, address): server for topic in topics or (EVERY_TOPIC,)}
        await self._announce(nodes, SERVERS, timeout)

    async def announce_publishers(
        self, address: str, server: Server, groups: Iterable[Key], *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Say which groups publish what through this broker, as (topic, group); instead of what was said before.

        Raises as `announce` does.
        """
        nodes = {publisher_path(topic, group, address): server for topic, group in groups}
        await self._announce(nodes, PUBLISHERS, timeout)

    async def withdraw(self, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Take back all that was announced. Raises `RegistryUnavailable`."""
        await self._announce({}, ROOT, timeout)

    async def _announce(self, nodes: dict[str, Server], instead_of: str, timeout: float) -> None:
        announcements = self._announcements
        request = self._attachment.ask(
            lambda: announcements.want(nodes, instead_of=f"{instead_of}/"), lambda: not announcements.unfinished
        )
        try:
            await self._attachment.wait_done(request, timeout)
        except RegistryUnavailable:
            if announcements.problem is not None:
                raise AddressTaken(str(announcements.problem)) from None
            raise

    async def merge_bindings(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Add or update bindings of a group in a topic, keeping what other brokers write at the same time.

        Await it before the bindings take effect here: a snapshot from before the call, taken after it, says
        nothing of this group and topic. Raises `RegistryUnavailable`, `UnreadableNode`, and `Refused` for
        bindings that contradict those in the registry, which then is left as it is.
        """
        await self._change((topic, group), merging(bindings), timeout)

    async def remove_binding(
        self, group: str, topic: str, bindings: Iterable[Binding], *, timeout: float = TIMEOUT_SECONDS
    ) -> None:
        """Remove bindings of a group in a topic; those of a kind and pattern that is not there are no error.

        Raises as `merge_bindings` does.
        """
        await self._change((topic, group), removing(bindings), timeout)

    async def _change(self, key: Key, change: Change, timeout: float) -> None:
        subscriptions = self._subscriptions
        request = self._attachment.ask(
            lambda: subscriptions.change(key, change), lambda: subscriptions.is_written(key, change)
        )
        self._unconfirmed[key] = self._attachment.asked
        await self._attachment.wait_done(request, timeout)

    async def wait_changed(self) -> Snapshot:
        """Wait until the registry holds something else than what was returned here last; return all of it."""
        snapshot = await self._attachment.wait_changed()
        taken = self._attachment.taken
        self._unconfirmed = {key: number for key, number in self._unconfirmed.items() if number > taken}
        if not self._unconfirmed:
            return snapshot
        return replace(snapshot, bindings={**snapshot.bindings, **dict.fromkeys(self._unconfirmed)})


@asynccontextmanager
async def open_registry(
    url: str,
    *,
    log: Log,
    credentials: Credentials | None = None,
    session_timeout: float = ZK_SESSION_SECONDS,
    bindings_of: Collection[str] | None = None,
    servers_of: Collection[str] | None = (),
    known: Mapping[Key, Iterable[Binding]] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> AsyncIterator[ZooKeeperRegistry]:
    """Keep a session with ZooKeeper as long as the block runs.

    bindings_of, servers_of: the topics of which snapshots tell, None for all.
    known: bindings by topic and group, from the broker's store; nodes that are missing are made from them.
    Enters when the registry was read, or after `timeout` seconds without it. Leaving takes back what was
    announced. Raises `ValueError` for the URL, and `CredentialsRefused`.
    """
    bell = threading.Event()
    session = ZooKeeperSession(parse_registry_url(url), credentials, session_timeout, bell.set, writes=True)
    subscriptions, servers = Subscriptions(session, log), Servers(session, log)
    announcements = Announcements(session, log)
    subscriptions.want(bindings_of)
    subscriptions.remember(known or {})
    servers.want(servers_of)

    def view() -> Snapshot:
        return Snapshot(subscriptions.snapshot(), servers.snapshot(), subscriptions.identity)

    attachment: Attachment[Snapshot] = Attachment()
    # What is announced comes last: a broker that is found knows its bindings.
    keeper = Keeper(session, (subscriptions, servers, announcements), view, log, attachment.tell)
    async with attachment.running(keeper, bell, timeout):
        yield ZooKeeperRegistry(attachment, subscriptions, servers, announcements)
