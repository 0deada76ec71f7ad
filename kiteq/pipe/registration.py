"""The bindings that this broker shares with others through a registry.

Theory of operation. There are three versions of a group's bindings in a topic: what is in force here (in
the store), what the registry holds, and what the registry held when it was last seen, which is kept in
the store too. Whoever differs from the last one has changed something, here or elsewhere, also during an
outage or while this broker was down; so nothing is unbound, and nothing bound again, by accident.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import msgpack
import structlog
import trio

from kiteq.binding.bindings import Binding, Kind, from_wire, to_wire
from kiteq.errors import Refused, StoreError
from kiteq.pipe.binding_changes import Done, bind, drop, unbind
from kiteq.registry.errors import RegistryError, UnreadableNode
from kiteq.registry.merging import Key, Pattern, pattern_of
from kiteq.store.tables import Table
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.outlet import Outlet
    from kiteq.registry.registry import Registry, Snapshot
    from kiteq.store.tables import Tables

__all__ = ["Reconciled", "Registration", "bind_shared", "drop_shared", "reconcile", "unbind_shared"]

PUBLISH_SECONDS: Final = 2.0
"""How long a client that binds waits for the registry; without it the binding is in force here, and shared later."""
META_REGISTRY: Final = b"r"
META_IDENTITY: Final = b"registry"

log = structlog.get_logger()

ByPattern = Mapping[Pattern, Binding]


class Reconciled(NamedTuple):
    """What has to be done. here: bindings to add or update, and to remove, in force here; shared: in the registry."""

    bind_here: list[Binding]
    unbind_here: list[Binding]
    bind_shared: list[Binding]
    unbind_shared: list[Binding]


def reconcile(seen: ByPattern, shared: ByPattern, here: ByPattern) -> Reconciled:
    """Return what brings the bindings here and in the registry together.

    seen: what the registry held when it was looked at last. `start` is of the moment and never compared.
    What was changed on both sides stays bound, as the registry says if it is bound there.
    """
    result = Reconciled([], [], [], [])
    for pattern in {**shared, **here, **seen}:
        before, theirs = seen.get(pattern), shared.get(pattern)
        ours = None if (found := here.get(pattern)) is None else replace(found, start="latest")
        if ours == theirs:
            continue
        changed_there = theirs != before
        if theirs is not None and changed_there:
            result.bind_here.append(theirs)
        elif changed_there and ours == before:
            assert found is not None
            result.unbind_here.append(found)
        elif ours is not None:
            result.bind_shared.append(ours)
        else:
            assert theirs is not None
            result.unbind_shared.append(theirs)
    return result


def bind_shared(core: Core, group: str, bindings: Sequence[Binding], done: Done) -> None:
    """Add or update bindings of a group at every broker; `done` is called when they are in force here, or refused."""
    if core.registration is None:
        bind(core, group, bindings, done)
    else:
        core.registration.bind(group, bindings, done)


def unbind_shared(core: Core, group: str, topic: str, kind: int, pattern: str, done: Done) -> bool:
    """Remove one binding at every broker; `done` is called in any case. Return whether it was in force here."""
    durable = trio.Event()
    errors: list[StoreError | Refused | None] = []

    def note(error: StoreError | Refused | None) -> None:
        errors.append(error)
        durable.set()

    async def remove_and_finish(registration: Registration) -> None:
        await durable.wait()
        if errors == [None]:
            with suppress(ValueError):  # what is no binding is bound nowhere
                await registration.remove(group, topic, [Binding(topic, Kind(kind), pattern)])
        done(errors[0])
        core.turn.end()

    first = done if core.registration is None else note
    was_here = unbind(core, group, topic, kind, pattern, first)
    if not was_here:
        first(None)
    if core.registration is not None:
        # Now, not when it is durable: the broker may be ending by then, and takes no more tasks.
        assert core.deliveries.nursery is not None
        core.deliveries.nursery.start_soon(remove_and_finish, core.registration)
    return was_here


async def drop_shared(core: Core, outlet: Outlet) -> None:
    """Let a group leave a topic at every broker, with all it is owed; return when that is durable here."""
    group, topic = outlet.subscription.group, outlet.subscription.topic.name
    bindings = core.router.submitted(group, topic)
    finished = trio.Event()
    drop(core, outlet, lambda _error: finished.set())
    core.turn.end()
    await finished.wait()
    if core.registration is not None:
        await core.registration.remove(group, topic, bindings)


class Registration:
    """Keeps the bindings of the store and those of the registry the same."""

    def __init__(self, core: Core, registry: Registry) -> None:
        self.applied = trio.Event()
        """Set once bindings of the registry are in force here: before that nobody should be sent here."""
        self._core = core
        self._registry = registry
        self._seen = _read_seen(core.store.tables)
        self._identity = (core.store.tables.get(Table.META, META_IDENTITY) or b"").decode()
        self._together: dict[Key, tuple[Sequence[Binding], Sequence[Binding]]] = {}
        """What the registry holds and what is in force here, as of the last look, where nothing was left to do."""
        self._warned: dict[Key, str] = {}
        self._coming: Counter[tuple[Key, Pattern]] = Counter()
        """What clients are binding at this moment: it is about to be in force, though not here yet."""

    # --- what clients change here --------------------------------------------------------------

    def bind(self, group: str, bindings: Sequence[Binding], done: Done) -> None:
        """Add or update bindings of a group in the registry and here; `done` as for one broker alone.

        An outage does not keep anybody from binding.
        """
        new = [one for one in bindings if self._is_new(group, one)]
        if not new:
            bind(self._core, group, bindings, done)
            return
        coming = [((one.topic, group), pattern_of(one)) for one in new]
        self._coming.update(coming)

        def finished(error: StoreError | Refused | None) -> None:
            for one in coming:
                self._coming[one] -= 1
                if not self._coming[one]:
                    del self._coming[one]
            done(error)

        nursery = self._core.deliveries.nursery
        assert nursery is not None
        nursery.start_soon(self._publish_and_bind, group, new, bindings, finished)

    def _is_new(self, group: str, binding: Binding) -> bool:
        """Return whether the registry may have to be told; also of one removed here, of which it may be told yet."""
        pattern = pattern_of(binding)
        seen = self._seen.get((binding.topic, group), {}).get(pattern)
        here = map(pattern_of, self._core.router.submitted(group, binding.topic))
        return seen != replace(binding, start="latest") or pattern not in here

    async def _publish_and_bind(
        self, group: str, new: Sequence[Binding], bindings: Sequence[Binding], done: Done
    ) -> None:
        try:
            self._core.router.merged(group, bindings)  # what is refused here should not be in the registry
            await self._merge(group, new)
        except Refused as refused:
            done(refused)
        else:
            bind(self._core, group, bindings, done)
        self._core.turn.end()

    async def _merge(self, group: str, bindings: Sequence[Binding]) -> None:
        """Have the registry add bindings; what it does not do in time it does afterwards. Raises `Refused`."""
        until = trio.current_time() + PUBLISH_SECONDS
        for topic, of_topic in _by_topic(bindings).items():
            left = max(0.0, until - trio.current_time())
            try:
                await self._registry.merge_bindings(group, topic, of_topic, timeout=left)
            except UnreadableNode as error:
                log.warning("a binding is not shared", group=group, reason=str(error))
            except RegistryError:
                until = -math.inf  # the others are only asked for: what nobody asks for is never shared

    async def remove(self, group: str, topic: str, bindings: Iterable[Binding]) -> None:
        """Take bindings, removed here already, out of the registry; during an outage that is done afterwards."""
        try:
            await self._registry.remove_binding(group, topic, bindings, timeout=PUBLISH_SECONDS)
        except (RegistryError, Refused) as error:  # what is left may contradict itself, when it was written by hand
            log.warning("a removed binding stays in the registry for now", group=group, topic=topic, reason=str(error))

    # --- what the registry says ----------------------------------------------------------------

    async def apply(self, snapshot: Snapshot) -> None:
        """Bring the bindings here and in the registry together; return when those here are in force."""
        unshared: list[tuple[Key, Reconciled]] = []
        self._note_identity(snapshot.identity)
        before, self._together = self._together, {}
        for key, shared in snapshot.bindings.items():
            if shared is None:
                continue
            topic, group = key
            both = shared, self._core.router.submitted(group, topic)
            if before.get(key) == both:  # of many thousands nearly all
                self._together[key] = both
                continue
            found = self._apply(key, {pattern_of(one): one for one in shared})
            if found.bind_shared or found.unbind_shared:
                unshared.append((key, found))
            elif not any(found):
                self._together[key] = both
        self._core.turn.end()
        await self._core.store.all_durable()
        self.applied.set()
        for key, found in unshared:
            await self._publish(key, found, {pattern_of(one): one for one in snapshot.bindings[key] or ()})

    def _apply(self, key: Key, shared: ByPattern) -> Reconciled:
        """Start what has to be done here.

        A binding counts as seen once it is in force: so what is refused here is tried again, and neither that
        nor what takes a while is ever mistaken for what was removed here.
        """
        topic, group = key
        core = self._core
        seen = self._seen.get(key, {})
        found = reconcile(seen, shared, {pattern_of(one): one for one in core.router.submitted(group, topic)})
        coming = {pattern_of(one): one for one in found.bind_here}
        note = self._noting_refusal(key)

        def unbind_rest() -> None:
            for one in found.unbind_here:
                unbind(core, group, topic, one.kind, one.pattern, note)

        def in_force(error: StoreError | Refused | None) -> None:
            note(error)
            if error is None:
                self._save_seen(key, {**self._seen.get(key, {}), **coming})
            elif isinstance(error, Refused):
                unbind_rest()

        for one in found.unbind_here:
            outlet = core.deliveries.group(group).outlets.get(topic)
            pending = 0 if outlet is None else outlet.subscription.pending
            log.warning("a binding was removed elsewhere", group=group, binding=str(one), pending=pending)
        if coming:  # in one step, as what comes may contradict what goes
            bind(core, group, found.bind_here, in_force, without=[pattern_of(one) for one in found.unbind_here])
        else:
            unbind_rest()
        kept = {pattern: one for pattern, one in shared.items() if pattern not in coming}
        self._save_seen(key, kept | {pattern: seen[pattern] for pattern in coming if pattern in seen})
        return found

    async def _publish(self, key: Key, found: Reconciled, shared: ByPattern) -> None:
        """Tell the registry what is new here; what it refuses is taken back here."""
        topic, group = key
        try:
            await self._share(key, found)
        except Refused as refused:
            log.warning(
                "bindings made during an outage contradict those in the registry, and are taken back",
                group=group, topic=topic, reason=str(refused),
            )  # fmt: skip
            self._take_back(key, found, shared)
            self._apply(key, shared)
            self._core.turn.end()
        except RegistryError as error:
            log.debug("bindings are not in the registry yet", group=group, topic=topic, reason=str(error))

    async def _share(self, key: Key, found: Reconciled) -> None:
        """Change the registry as it was found to be right, but for what clients have changed here since then."""
        topic, group = key
        is_refused = False
        if bound := self._still_bound(key, found.bind_shared):
            try:
                await self._registry.merge_bindings(group, topic, bound, timeout=PUBLISH_SECONDS)
            except Refused:
                if not found.unbind_shared:
                    raise
                is_refused = True  # it may contradict only what is removed
        if unbound := self._still_unbound(key, found.unbind_shared):
            await self._registry.remove_binding(group, topic, unbound, timeout=PUBLISH_SECONDS)
        if is_refused and (bound := self._still_bound(key, found.bind_shared)):
            await self._registry.merge_bindings(group, topic, bound, timeout=PUBLISH_SECONDS)

    def _take_back(self, key: Key, found: Reconciled, shared: ByPattern) -> None:
        """Let a group be bound here as the registry says, where that has refused to be changed."""
        topic, group = key
        core, note = self._core, self._noting_refusal(key)
        refused = [pattern_of(one) for one in self._still_bound(key, found.bind_shared)]
        back = [*(shared[pattern] for pattern in refused if pattern in shared), *found.bind_here]
        new = [pattern for pattern in refused if pattern not in shared]
        if back:
            bind(core, group, back, note, without=new)
        else:
            for kind, pattern in new:
                unbind(core, group, topic, kind, pattern, note)

    def _still_bound(self, key: Key, bindings: Iterable[Binding]) -> list[Binding]:
        here = self._here(key)
        return [one for one in bindings if here.get(pattern_of(one)) == one]

    def _still_unbound(self, key: Key, bindings: Iterable[Binding]) -> list[Binding]:
        here = self._here(key)
        return [one for one in bindings if pattern_of(one) not in here and (key, pattern_of(one)) not in self._coming]

    def _here(self, key: Key) -> ByPattern:
        topic, group = key
        return {pattern_of(one): replace(one, start="latest") for one in self._core.router.submitted(group, topic)}

    def _noting_refusal(self, key: Key) -> Done:
        def done(error: StoreError | Refused | None) -> None:
            if error is None:
                self._warned.pop(key, None)
            elif self._warned.get(key) != str(error):
                self._warned[key] = str(error)
                topic, group = key
                log.warning(
                    "a binding of the registry is not in force here", group=group, topic=topic, reason=str(error)
                )

        return done

    def _note_identity(self, identity: str) -> None:
        """Forget what another registry held: what this one lacks was not removed from it."""
        if identity == self._identity:
            return
        submission = Submission(urgent=False)
        submission.rows += [(Table.META, _seen_key(key), None) for key in self._seen]
        submission.rows.append((Table.META, META_IDENTITY, identity.encode()))
        self._core.store.writer.submit(submission)
        self._identity = identity
        self._seen.clear()
        self._together.clear()

    def _save_seen(self, key: Key, shared: ByPattern) -> None:
        if shared == self._seen.get(key, {}):
            return
        submission = Submission(urgent=False)
        if shared:
            self._seen[key] = dict(shared)
            value = msgpack.packb([*key, [to_wire(one) for one in shared.values()]])
            submission.rows.append((Table.META, _seen_key(key), value))
        else:
            self._seen.pop(key, None)
            submission.rows.append((Table.META, _seen_key(key), None))
        self._core.store.writer.submit(submission)


def _seen_key(key: Key) -> bytes:
    # Two names of 255 characters are longer than a key may be.
    return META_REGISTRY + hashlib.sha256("\0".join(key).encode()).digest()


def _read_seen(tables: Tables) -> dict[Key, dict[Pattern, Binding]]:
    seen: dict[Key, dict[Pattern, Binding]] = {}
    end = bytes([META_REGISTRY[0] + 1])
    for key, value in tables.scan(Table.META, META_REGISTRY, end):
        if len(key) == len(META_REGISTRY) + hashlib.sha256().digest_size:
            topic, group, wires = msgpack.unpackb(value)
            bindings = [from_wire(wire) for wire in wires]
            seen[topic, group] = {pattern_of(one): one for one in bindings}
    return seen


def _by_topic(bindings: Iterable[Binding]) -> dict[str, list[Binding]]:
    topics: dict[str, list[Binding]] = {}
    for one in bindings:
        topics.setdefault(one.topic, []).append(one)
    return topics
