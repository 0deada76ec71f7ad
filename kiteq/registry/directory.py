"""Who serves which topic, as a client finds it out; under trio and asyncio."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Final

from kiteq.limits import ZK_SESSION_SECONDS
from kiteq.registry.attachment import Attachment
from kiteq.registry.keeper import Keeper
from kiteq.registry.layout import Server, ServerMap
from kiteq.registry.log import Log
from kiteq.registry.servers import Servers, servers_of
from kiteq.registry.session import ZooKeeperSession
from kiteq.registry.state import RegistryState
from kiteq.registry_address import Credentials, parse_registry_url

__all__ = ["Directory", "open_directory"]

FULL_SECONDS: Final = 300.0
"""Clients are many: each reading every announcement twice a minute would be most of what ZooKeeper does."""

TIMEOUT_SECONDS: Final = 5.0


class Directory:
    """The brokers of some topics; `open_directory` makes one."""

    def __init__(self, attachment: Attachment[ServerMap]) -> None:
        self._attachment = attachment

    @property
    def state(self) -> RegistryState:
        """Whether the registry is as it should be, since when not and why."""
        return self._attachment.state()

    def servers_of(self, topic: str) -> dict[str, Server] | None:
        """Return the brokers that serve a topic by address, as known now; None before the registry was read.

        During an outage these are the last ones known.
        """
        return None if self._attachment.view is None else servers_of(self._attachment.view, topic)

    async def wait_changed(self) -> ServerMap:
        """Wait until other brokers are known than were returned here last; return them by topic and address."""
        return await self._attachment.wait_changed()


@asynccontextmanager
async def open_directory(
    url: str,
    topics: Collection[str] | None,
    *,
    log: Log,
    credentials: Credentials | None = None,
    session_timeout: float = ZK_SESSION_SECONDS,
    timeout: float = TIMEOUT_SECONDS,
) -> AsyncIterator[Directory]:
    """Know the brokers of these topics, None for all, as long as the block runs.

    Enters when the registry was read, or after `timeout` seconds without it.
    Raises `ValueError` for the URL, and `CredentialsRefused`.
    """
    bell = threading.Event()
    session = ZooKeeperSession(parse_registry_url(url), credentials, session_timeout, bell.set, writes=False)
    servers = Servers(session, log)
    servers.want(topics)
    attachment: Attachment[ServerMap] = Attachment()
    keeper = Keeper(session, (servers,), servers.snapshot, log, attachment.tell, FULL_SECONDS)
    async with attachment.running(keeper, bell, timeout):
        yield Directory(attachment)
