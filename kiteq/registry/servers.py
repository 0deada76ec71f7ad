"""Who serves which topic: copied from the registry by watches."""

from __future__ import annotations

from collections.abc import Collection

from kiteq.registry.layout import EVERY_TOPIC, SERVERS, Server, ServerMap, decode_server
from kiteq.registry.log import Log
from kiteq.registry.mirror import Mirror
from kiteq.registry.session import ZooKeeperSession
from kiteq.values import split_address

__all__ = ["Servers", "servers_of"]


def servers_of(servers: ServerMap, topic: str) -> dict[str, Server]:
    """Return the brokers that serve a topic, by address."""
    return {**servers.get(EVERY_TOPIC, {}), **servers.get(topic, {})}


class Servers:
    """A copy of the announcements of brokers."""

    unfinished = False
    problem = None

    def __init__(self, session: ZooKeeperSession, log: Log) -> None:
        self._mirror: Mirror[Server] = Mirror(session, log, SERVERS, _read)

    def want(self, topics: Collection[str] | None) -> None:
        """Copy these topics from now on, None for all; brokers of every topic belong to each."""
        self._mirror.want(None if topics is None else {*topics, EVERY_TOPIC} if topics else ())

    def refresh(self, *, full: bool) -> bool:
        """Read what has changed; return whether the copy has. Raises as `Mirror.refresh` does."""
        return self._mirror.refresh(full=full)

    def snapshot(self) -> ServerMap:
        """Return who serves what, without nodes that cannot be read."""
        return self._mirror.readable()


def _read(_topic: str, name: str, content: bytes) -> Server:
    try:
        split_address(name)
    except ValueError as error:
        raise ValueError(f"its name must be {error}") from None
    return decode_server(content)
