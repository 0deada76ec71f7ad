"""What the workers of a set share: who is bound to what.

Theory of operation. A node is the list of a group's bindings in a topic, as in ZooKeeper: missing means
that nothing is known, empty that all were removed. Nothing is on disk here: each worker keeps the bindings
in its store and tells them when it starts, and the board is the union of that. What was removed meanwhile
is remembered, so that a worker that was down does not bring it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from kiteq.binding.bindings import Binding
from kiteq.errors import Refused
from kiteq.registry.layout import entry
from kiteq.registry.merging import Change, Key, Pattern, apply, merging, pattern_of, removing

__all__ = ["Board"]

REMOVED_MAX: Final = 100_000
"""Removed bindings that are remembered, the last ones: each `kiteq listen` leaves one."""


class Board:
    """Bindings by topic and group."""

    def __init__(self) -> None:
        self._nodes: dict[Key, tuple[Binding, ...]] = {}
        self._removed: dict[tuple[Key, Pattern], None] = {}

    @property
    def nodes(self) -> Mapping[Key, tuple[Binding, ...]]:
        """Every node of which something is known."""
        return self._nodes

    def learn(self, key: Key, bindings: Iterable[Binding]) -> bool:
        """Add what a worker's store knows and the board does not, but for what was removed.

        Returns whether that changes the node. Raises `Refused` when it contradicts what is known here, which stays.
        """
        here = {pattern_of(one) for one in self._nodes.get(key, ())}
        kept = [one for one in bindings if pattern_of(one) not in here and (key, pattern_of(one)) not in self._removed]
        return bool(kept) and self._change(key, merging(kept))

    def merge(self, key: Key, bindings: Iterable[Binding]) -> bool:
        """Add or update bindings; return whether that changes the node. Raises `Refused` for a contradiction."""
        change = merging(bindings)
        changed = self._change(key, change)
        for pattern in change.wishes:
            self._removed.pop((key, pattern), None)
        return changed

    def remove(self, key: Key, bindings: Iterable[Binding]) -> list[Key]:
        """Remove bindings, also those only a worker that is down knows of; return the nodes that have changed."""
        change = removing(bindings)
        changed = [key] if self._change(key, change) or key not in self._nodes else []
        self._nodes.setdefault(key, ())
        for pattern in change.wishes:
            self._removed.pop((key, pattern), None)
            self._removed[key, pattern] = None
        while len(self._removed) > REMOVED_MAX:
            (oldest, pattern) = next(iter(self._removed))
            del self._removed[oldest, pattern]
            if self._nodes.get(oldest) == ():
                del self._nodes[oldest]
                changed.append(oldest)
        return changed

    def _change(self, key: Key, change: Change) -> bool:
        group = key[1]
        entries = [entry(group, binding) for binding in self._nodes.get(key, ())]
        try:
            after = apply(group, entries, change)
        except ValueError as error:
            raise Refused("binding_conflict", f"group {group!r}: {error}") from error
        if after is None:
            return False
        self._nodes[key] = tuple(one.binding for one in after)
        return True
