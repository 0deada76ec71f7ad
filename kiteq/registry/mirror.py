"""A copy of a part of the registry, kept by watches: topics, and one level of nodes below each.

Every watch is set by the read that it guards, so nothing is missed between; what a watch tells is only
that a path has to be read again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final, Generic, TypeVar

from kiteq.message import check_name
from kiteq.registry.layout import EVERY_TOPIC
from kiteq.registry.log import Log
from kiteq.registry.session import NoNodeError, ZooKeeperSession

__all__ = ["Mirror"]

Value = TypeVar("Value")
WARNED_MAX: Final = 10_000


class Mirror(Generic[Value]):
    """The nodes `<base>/<topic>/<name>` of some topics.

    read: makes a value of topic, name and content, or None of a node that is of another kind; raises
    `ValueError` for a malformed one, which is told once and has the value None too.
    """

    def __init__(
        self,
        session: ZooKeeperSession,
        log: Log,
        base: str,
        read: Callable[[str, str, bytes], Value | None],
    ) -> None:
        self.values: dict[str, dict[str, Value | None]] = {}
        self.complete = False  # a read was broken off: what is here is partly old
        self._session = session
        self._log = log
        self._base = base
        self._read = read
        self._wanted: frozenset[str] | None = frozenset()
        self._dirty: set[str] = set()
        self._watch = session.watch(self._dirty.add)
        self._told: dict[str, dict[str, Value | None]] | None = None
        self._warned: dict[str, int] = {}

    def covers(self, topic: str) -> bool:
        """Return whether a topic is copied."""
        return self._wanted is None or topic in self._wanted

    def want(self, topics: Collection[str] | None) -> None:
        """Copy these topics from now on, None for all."""
        self._wanted = None if topics is None else frozenset(topics)
        self.complete = False

    def touch(self, topic: str, path: str) -> None:
        """Read this node in the next turn: it has just been written here."""
        self._dirty.update((self._base, self._path(topic), path))

    def refresh(self, *, full: bool) -> bool:
        """Read what has changed, or everything; return whether the copy is another one now.

        Raises `RegistryUnavailable` and `CredentialsRefused`; the next one must be full then.
        """
        full = full or not self.complete
        dirty = {self._dirty.pop() for _ in range(len(self._dirty))}  # kazoo's thread adds to it meanwhile
        if not full and not dirty:
            return False
        self.complete = False
        self._refresh(full, dirty)
        self.complete = True
        before, self._told = self._told, {topic: dict(values) for topic, values in self.values.items()}
        return self._told != before

    def _refresh(self, full: bool, dirty: set[str]) -> None:
        topics = self._topics(full, dirty)
        for gone in self.values.keys() - topics:
            del self.values[gone]
        stale = [topic for topic in topics if full or topic not in self.values or self._path(topic) in dirty]
        unread: list[tuple[str, str]] = []
        for topic, names in zip(stale, self._children([self._path(topic) for topic in stale]), strict=True):
            old = self.values.get(topic, {})
            self.values[topic] = {name: old[name] for name in names if name in old and not full}
            unread += [(topic, name) for name in names if name not in self.values[topic]]
        for path in dirty:
            topic, slash, name = path.removeprefix(self._base + "/").partition("/")
            if slash and name in self.values.get(topic, {}) and (topic, name) not in unread:
                unread.append((topic, name))
        self._read_nodes(unread)

    def _topics(self, full: bool, dirty: set[str]) -> Collection[str]:
        if self._wanted is not None:
            return self._wanted
        if not full and self._base not in dirty:
            return set(self.values)
        return [name for name in self._children([self._base])[0] if self._is_topic(name)]

    def _is_topic(self, name: str) -> bool:
        if name != EVERY_TOPIC:
            try:
                check_name("topic", name)
            except ValueError:
                self._warn(f"{self._base}/{name}", 0, "its name is not that of a topic")
                return False
        return True

    def _path(self, topic: str) -> str:
        return f"{self._base}/{topic}"

    def _children(self, paths: list[str]) -> list[list[str]]:
        """Return the names below each path, none below a missing one; from now on all of them are watched."""
        found: list[list[str]] = []
        missing: list[str] = []
        for path, answer in zip(
            paths, self._session.gather("get_children", [(path, self._watch) for path in paths]), strict=True
        ):
            found.append([] if isinstance(answer, NoNodeError) else answer)
            missing += [path] if isinstance(answer, NoNodeError) else []
        for path, exists in zip(
            missing, self._session.gather("exists", [(path, self._watch) for path in missing]), strict=True
        ):
            if exists is not None:  # it was created meanwhile: read it in the next turn
                self._dirty.add(path)
                self._session.ring()
        return found

    def _read_nodes(self, unread: list[tuple[str, str]]) -> None:
        requests = [(f"{self._path(topic)}/{name}", self._watch) for topic, name in unread]
        for (topic, name), answer in zip(unread, self._session.gather("get", requests), strict=True):
            if isinstance(answer, Exception):
                self.values[topic].pop(name, None)
                continue
            content, stat = answer
            try:
                self.values[topic][name] = self._read(topic, name, content)
            except ValueError as error:
                self.values[topic][name] = None
                self._warn(f"{self._path(topic)}/{name}", stat.mzxid, str(error))

    def _warn(self, path: str, change: int, reason: str) -> None:
        if self._warned.get(path) == change:
            return
        if len(self._warned) >= WARNED_MAX:
            self._warned.clear()
        self._warned[path] = change
        self._log.warning("a node of the registry is not what KiteQ writes; it is left out", node=path, reason=reason)

    def readable(self) -> Mapping[str, Mapping[str, Value]]:
        """Return the values without those that could not be read."""
        return {
            topic: {name: value for name, value in values.items() if value is not None}
            for topic, values in self.values.items()
        }
