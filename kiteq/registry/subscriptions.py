"""The bindings in the registry: changed by compare-and-set, copied by watches, filled in again when they are lost.

Theory of operation. `_pending` is what was asked for here and is not known to be in ZooKeeper. It is
written before the copy is read, so that a copy never lacks what was just bound here during an outage.
`_known` is what each node held when it was seen last. When a node is gone, for instance because
ZooKeeper was wiped, it is made again from that: nothing is unbound by being missing.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from kiteq.binding.bindings import Binding
from kiteq.errors import Refused
from kiteq.registry.errors import UnreadableNode
from kiteq.registry.layout import BINDINGS, bindings_path, decode_entries, encode_entries, entry, group_of
from kiteq.registry.log import Log
from kiteq.registry.merging import Change, Key, apply, read_bindings
from kiteq.registry.mirror import Mirror
from kiteq.registry.session import NoNodeError, ZooKeeperSession

__all__ = ["Subscriptions"]

FORGOTTEN_SECONDS: Final = 7 * 86_400.0
"""A node without bindings tells brokers that were down what was removed; after this long it goes."""
SWEEP_SECONDS: Final = 3_600.0
ROUNDS_MAX: Final = 64
"""Attempts of a compare-and-set in one turn; each that fails means that another broker has changed the node."""


class Subscriptions:
    """What groups are bound to, here and in ZooKeeper."""

    unfinished = False

    def __init__(self, session: ZooKeeperSession, log: Log) -> None:
        self.identity = ""
        """When the folder of all bindings was made: another one after ZooKeeper was wiped."""
        self._unreadable: dict[Key, UnreadableNode] = {}
        self._session = session
        self._log = log
        self._mirror: Mirror[tuple[Binding, ...]] = Mirror(session, log, BINDINGS, _read)
        self._has_news = False
        self._pending: dict[Key, list[Change]] = {}
        self._replaced: list[tuple[Change, Change]] = []
        """Changes of this turn whose wishes are those of a later one, and that: they share its fate."""
        self._stuck: set[Key] = set()
        self._known: dict[Key, tuple[Binding, ...]] = {}
        self._sweep_at = 0.0

    def want(self, topics: Collection[str] | None) -> None:
        """Copy the bindings of these topics from now on, None for all."""
        self._mirror.want(topics)

    def remember(self, bindings: Mapping[Key, Iterable[Binding]]) -> None:
        """Take what the broker's store knows, by topic and group, for nodes that are missing."""
        self._known |= {key: tuple(known) for key, known in bindings.items() if known}

    def change(self, key: Key, change: Change) -> None:
        """Have a change made; it is kept until it is known to be in ZooKeeper, or a later one replaces it."""
        earlier = self._pending.get(key, [])
        for one in earlier:
            if replaced := one.wishes.keys() & change.wishes.keys():
                self._replaced.append((one, change))
            for pattern in replaced:
                del one.wishes[pattern]
        self._pending[key] = [*(one for one in earlier if one.wishes), change]
        self._stuck.discard(key)
        self._has_news = True  # what was told of this node meanwhile is not believed

    @property
    def problem(self) -> UnreadableNode | None:
        """A node that cannot be read and has to be written."""
        return next(iter(self._unreadable.values()), None)

    def is_written(self, key: Key, change: Change) -> bool:
        """Return whether a change is in ZooKeeper.

        Raises `Refused` when it contradicts what is there, and was dropped; and `UnreadableNode` when the
        node has to be deleted first.
        """
        if change.error is not None:
            raise change.error
        if key in self._unreadable:
            raise UnreadableNode(str(self._unreadable[key]))
        return change not in self._pending.get(key, ())

    def refresh(self, *, full: bool) -> bool:
        """Write what is pending, then read; return whether the copy has changed.

        Raises `RegistryUnavailable` and `CredentialsRefused`.
        """
        if full:
            self._stuck.clear()
        try:
            self._write([key for key in self._pending if key not in self._stuck])
        finally:
            self._share_fates()
        changed = self._mirror.refresh(full=full)
        self._has_news |= changed  # a later step may raise: it is told when one turn comes through
        if full and self._fill_in():
            self._has_news |= self._mirror.refresh(full=False)
        if full or changed:
            self._note_identity()  # after the nodes were read: they are of this folder, or of an older one
            for key, bindings in self.snapshot().items():
                if bindings:
                    self._known[key] = bindings
                elif bindings is not None:
                    self._known.pop(key, None)
        if full and time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_SECONDS
            self._sweep()
        has_news, self._has_news = self._has_news, False
        return has_news

    def _share_fates(self) -> None:
        for one, later in reversed(self._replaced):
            if one.error is None and later.error is not None:
                one.error = Refused(later.error.code, later.error.reason)
        self._replaced.clear()

    def snapshot(self) -> dict[Key, tuple[Binding, ...] | None]:
        """Return what each node holds, by topic and group; None for one of which that is not known now."""
        found: dict[Key, tuple[Binding, ...] | None] = {}
        for topic, values in self._mirror.values.items():
            for name, bindings in values.items():
                group = group_of(name)
                if group is not None:
                    found[topic, group] = None if (topic, group) in self._pending else bindings
        return found

    def _fill_in(self) -> bool:
        """Make nodes again that are missing though their bindings are known."""
        there = self.snapshot().keys()
        lost = [key for key in self._known if key not in there and self._mirror.covers(key[0])]
        for key in lost:
            self._pending.setdefault(key, [])
        if lost:
            self._log.info("bindings missing in the registry are written again", nodes=len(lost))
            self._write(lost)
        return bool(lost)

    def _note_identity(self) -> None:
        stat = self._session.call("exists", BINDINGS)
        if stat is None:
            self._session.make_folders([BINDINGS])
            stat = self._session.call("exists", BINDINGS)
        if stat is not None:  # else it was deleted this moment, and that rings
            identity = f"{stat.czxid:x}-{stat.ctime:x}"
            self._has_news |= identity != self.identity
            self.identity = identity

    def _sweep(self) -> None:
        """Delete nodes that hold no binding any more, long after the last one was removed."""
        paths = [bindings_path(*key) for key, bindings in self.snapshot().items() if bindings == ()]
        old: list[tuple[str, int]] = []
        for path, answer in zip(paths, self._session.gather("get", [(path,) for path in paths]), strict=True):
            if isinstance(answer, Exception):
                continue
            stat = answer[1]
            if time.time() - stat.mtime / 1000 > FORGOTTEN_SECONDS:
                old.append((path, stat.version))
        self._session.gather("delete", old)

    def _write(self, keys: list[Key]) -> None:
        for _ in range(ROUNDS_MAX):
            if not keys:
                return
            keys = self._compare_and_set(keys)
        self._stuck.update(keys)

    def _compare_and_set(self, keys: list[Key]) -> list[Key]:
        """Try once for each; return those whose node has changed meanwhile."""
        updates: list[tuple[Key, str, bytes, int]] = []
        creations: list[tuple[Key, str, bytes]] = []
        answers = self._session.gather("get", [(bindings_path(*key),) for key in keys])
        for key, answer in zip(keys, answers, strict=True):
            missing = isinstance(answer, NoNodeError)
            content = self._changed(key, None if missing else answer[0])
            if content is None:
                if key not in self._stuck:
                    del self._pending[key]
                    self._has_news = True
            elif missing:
                creations.append((key, bindings_path(*key), content))
            else:
                updates.append((key, bindings_path(*key), content, answer[1].version))
        again: list[Key] = []
        for update, answer in zip(
            updates, self._session.gather("set", [update[1:] for update in updates]), strict=True
        ):
            self._done(update[0], answer, again)
        self._session.make_folders({path.rpartition("/")[0] for _, path, _ in creations})
        requests = [(path, content, self._session.acl) for _, path, content in creations]
        for creation, answer in zip(creations, self._session.gather("create", requests), strict=True):
            self._done(creation[0], answer, again)
        return again

    def _done(self, key: Key, answer: object, again: list[Key]) -> None:
        if isinstance(answer, Exception):
            again.append(key)
            return
        del self._pending[key]
        self._has_news = True
        self._mirror.touch(key[0], bindings_path(*key))

    def _changed(self, key: Key, content: bytes | None) -> bytes | None:
        """Return what the node has to hold, None when it is as it should be or has to be left alone."""
        topic, group = key
        try:
            if content is None:
                entries = [entry(group, binding) for binding in self._known.get(key, ())]
            else:
                entries = decode_entries(topic, group, content)
        except ValueError as error:
            self._leave_alone(key, f"is not what KiteQ writes ({error}); delete it, and the brokers write it anew")
            return None
        self._unreadable.pop(key, None)
        after, result = entries, content
        for change in self._pending[key]:
            change.error = None
            try:
                changed = apply(group, after, change)
                if changed is not None:
                    after, result = changed, encode_entries(changed)
            except ValueError as error:
                change.error = Refused("binding_conflict", f"group {group!r}: {error}")
                self._log.warning(
                    "bindings contradict those in the registry", topic=topic, group=group, reason=str(error)
                )
        if content is None and result is None:
            try:
                result = encode_entries(entries)
            except ValueError as error:  # more than a node takes were bound while there was no registry
                self._leave_alone(key, f"cannot be written: {error}")
        return None if result == content else result

    def _leave_alone(self, key: Key, why: str) -> None:
        self._stuck.add(key)
        self._unreadable[key] = UnreadableNode(f"the node {bindings_path(*key)} {why}")


def _read(topic: str, name: str, content: bytes) -> tuple[Binding, ...] | None:
    group = group_of(name)
    return None if group is None else read_bindings(topic, group, content)
