"""From what --broker says to the addresses of brokers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

from kiteq.cli.failing import STATUS_USAGE, CommandFailed
from kiteq.errors import NotConnected
from kiteq.registry_address import parse_registry_url, read_credentials
from kiteq.values import split_address

if TYPE_CHECKING:
    from kiteq.registry.directory import Directory
    from kiteq.registry.layout import Server, ServerMap

__all__ = ["LIST_SCHEME", "Announced", "Source", "is_registry", "open_source"]

LIST_SCHEME: Final = "kiteq://"
REGISTRY_SCHEME: Final = "zk://"
EVERY_TOPIC: Final = "*"


@dataclass(frozen=True, slots=True)
class Announced:
    """What the registry says of a broker; topics: those it serves, "*" for every name."""

    broker_id: str
    epoch: int
    wire_version: int
    topics: tuple[str, ...]


class Source(Protocol):
    """Where addresses come from."""

    def brokers(self) -> dict[str, Announced | None]:
        """Return the brokers known now by address, with what was announced of them, if that is known."""


def is_registry(named: str) -> bool:
    """Return whether --broker names a registry, not brokers."""
    return named.startswith(REGISTRY_SCHEME)


def open_source(named: str) -> AbstractContextManager[Source]:
    """Know the brokers of HOST:PORT, kiteq://A,B or zk://ENSEMBLE as long as the block runs.

    Raises `CommandFailed`, and `NotConnected` or what the registry refuses when the block begins.
    """
    if is_registry(named):
        try:
            parse_registry_url(named)
        except ValueError as error:
            raise CommandFailed(f"--broker: {error}", STATUS_USAGE) from None
        return _Registry(named)
    addresses = named.removeprefix(LIST_SCHEME).split(",")
    for address in addresses:
        try:
            split_address(address)
        except ValueError as error:
            said = f"--broker is {named!r}; it must be {error}, or kiteq://HOST:PORT,HOST:PORT, or zk://HOST:PORT"
            raise CommandFailed(said, STATUS_USAGE) from None
    return _Listed(addresses)


class _Listed:
    def __init__(self, addresses: list[str]) -> None:
        self._addresses = dict.fromkeys(addresses)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def brokers(self) -> dict[str, Announced | None]:
        """Return those of the list."""
        return dict(self._addresses)


class _Registry:
    """A copy of the announcements in ZooKeeper, kept up to date by an event loop in a thread."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._life = ExitStack()
        self._seen: dict[str, Announced | None] = {}
        self._read = threading.Event()

    def __enter__(self) -> Self:
        from anyio.from_thread import start_blocking_portal

        from kiteq.registry.directory import open_directory
        from kiteq.registry.log import StandardLog

        quiet = logging.getLogger("kiteq.cli.registry")  # what matters is told by the command itself
        quiet.addHandler(logging.NullHandler())
        quiet.propagate = False
        credentials = read_credentials(os.environ)
        with ExitStack() as life:
            portal = life.enter_context(start_blocking_portal("asyncio"))
            directory = life.enter_context(
                portal.wrap_async_context_manager(
                    open_directory(self._url, None, log=StandardLog(quiet), credentials=credentials)
                )
            )
            if directory.servers_of(EVERY_TOPIC) is None:
                raise NotConnected(f"the registry {self._url} cannot be read: {directory.state.reason}")
            life.callback(_cancel(portal.start_task_soon(self._follow, directory)))
            self._read.wait()
            self._life = life.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._life.close()

    async def _follow(self, directory: Directory) -> None:
        while True:
            self._seen = _by_address(await directory.wait_changed())
            self._read.set()

    def brokers(self) -> dict[str, Announced | None]:
        """Return those announced now, or before the registry was lost."""
        return dict(self._seen)


def _cancel(future: Future[None]) -> Callable[[], object]:
    return future.cancel


def _by_address(servers: ServerMap) -> dict[str, Announced | None]:
    told: dict[str, tuple[Server, list[str]]] = {}
    for topic, by_address in sorted(servers.items()):
        for address, server in by_address.items():
            told.setdefault(address, (server, []))[1].append(topic)
    return {
        address: Announced(server.broker_id, server.epoch, server.wire_version, tuple(topics))
        for address, (server, topics) in sorted(told.items())
    }
