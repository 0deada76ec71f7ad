"""The brokers that are announced in ZooKeeper."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final

import anyio

from kiteq.errors import AuthenticationError
from kiteq.registry_address import Credentials, parse_registry_url, read_credentials
from kiteq_client.members import Member
from kiteq_client.registry import Address, parse_broker

if TYPE_CHECKING:
    from kiteq.registry.directory import Directory
    from kiteq.registry.layout import Server, ServerMap

__all__ = ["Announced"]

logger = logging.getLogger("kiteq_client")

EVERY_TOPIC: Final = "*"
ENTER_SHARE: Final = 0.9
"""The directory gives up waiting a little before the client does, which then can say why."""
SETTLE_SECONDS: Final = 0.03
SETTLE_SECONDS_MAX: Final = 0.3
"""How long nothing must have changed, and for how long that is waited for."""
REFUSED_SECONDS: Final = 5.0
"""Credentials that were refused are tried again this often: somebody may put them right in ZooKeeper."""


class Announced:
    """The brokers of a registry `zk://host:2181,host2:2181/chroot`; while it is away, those known before."""

    def __init__(self, url: str, timeout: float) -> None:
        self.refusal: Exception | None = None
        self._url = str(parse_registry_url(url))
        self._timeout = timeout
        self._credentials: Credentials | None = None
        self._directory: Directory | None = None
        self._known: dict[Address, Member] = {}
        self._is_read = False
        self._warned: set[str] = set()

    @property
    def has_topics(self) -> bool:
        """A broker is announced for each of its topics."""
        return True

    @property
    def source(self) -> str:
        """Return where brokers are found."""
        return self._url

    def prepare(self) -> None:
        """Read who we are to ZooKeeper from the environment. Raises `ConfigError`."""
        self._credentials = read_credentials(os.environ)

    def known(self) -> Mapping[Address, Member]:
        """Return the brokers known now, or last."""
        return self._known

    def told(self, by: Address, addresses: Iterable[str]) -> None:
        """Do nothing: the brokers of a set announce themselves."""

    def state(self) -> str:
        """Return in words whether the registry is reached."""
        if self.refusal is not None:
            return f"{self._url}: {self.refusal}"
        if self._directory is None:
            return f"{self._url}: not reached yet"
        state = self._directory.state
        return f"{self._url}: {state.reason}" if state.degraded else f"{self._url}: connected"

    def problem(self, topics: Iterable[str]) -> str:
        """Return in words why there may be no broker for one of these topics."""
        if not self._is_read:
            reason = self.state().removeprefix(f"{self._url}: ")
            return f"the registry {self._url} was not reached: {reason}"
        wanted = list(topics)
        missing = [topic for topic in wanted if not any(one.serves_topic(topic) for one in self._known.values())]
        if missing:
            return f"no broker is announced for {', '.join(sorted(missing))} in {self._url}"
        return "" if wanted or self._known else f"no broker is announced in {self._url}"

    async def run(self, changed: Callable[[], None]) -> None:
        """Follow the announcements; call `changed` at each change."""
        # Here, because a client that has a list of brokers must not load kazoo.
        from kiteq.registry.directory import open_directory
        from kiteq.registry.errors import CredentialsRefused
        from kiteq.registry.log import StandardLog

        while True:
            try:
                async with open_directory(
                    self._url, None, log=StandardLog(logger), credentials=self._credentials,
                    timeout=self._timeout * ENTER_SHARE,
                ) as self._directory:  # fmt: skip
                    self.refusal = None
                    while True:
                        self._learn(await _settled(self._directory))
                        changed()
            except CredentialsRefused as error:
                self._directory = None
                self.refusal = AuthenticationError("authentication_failed", str(error))
                changed()
            await anyio.sleep(REFUSED_SECONDS)

    def _learn(self, servers: ServerMap) -> None:
        starts: dict[str, tuple[int, str]] = {}
        addresses: dict[str, int] = {}
        said = [(topic, text, server) for topic, one in servers.items() for text, server in one.items()]
        for _, text, server in said:
            starts[server.broker_id] = max(starts.get(server.broker_id, (-1, "")), (server.epoch, text))
            addresses[text] = max(addresses.get(text, -1), server.epoch)
        topics: dict[str, set[str]] = {}
        announced: dict[str, Server] = {}
        for topic, text, server in said:
            # Older ones are what is left of a start before: their session is not over yet.
            if server.epoch == addresses[text] == starts[server.broker_id][0]:
                topics.setdefault(text, set()).add(topic)
                announced[text] = server
        known: dict[Address, Member] = {}
        for text, server in announced.items():
            try:
                address = parse_broker(text)
            except ValueError as error:
                if text not in self._warned:
                    self._warned.add(text)
                    logger.warning("%s announces a broker at a wrong address: %s", self._url, error)
                continue
            serves = None if EVERY_TOPIC in topics[text] else frozenset(topics[text])
            known[address] = Member(address, serves, server.broker_id, server.epoch)
        self._known = known
        self._is_read = True


async def _settled(directory: Directory) -> ServerMap:
    """Return who is announced once that stands still: brokers announce their topics one after the other."""
    servers = await directory.wait_changed()
    with anyio.move_on_after(SETTLE_SECONDS_MAX):
        is_still = False
        while not is_still:
            with anyio.move_on_after(SETTLE_SECONDS) as scope:
                servers = await directory.wait_changed()
            is_still = scope.cancelled_caught
    return servers
