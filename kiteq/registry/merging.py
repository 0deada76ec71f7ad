"""Changes of a group's bindings in one topic: as pure functions of what the node holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kiteq.binding.bindings import Binding, Kind
from kiteq.binding.matching import Matcher, check_agreement
from kiteq.errors import Refused
from kiteq.registry.layout import Entry, decode_entries, entry

__all__ = ["Change", "Key", "Pattern", "apply", "merging", "pattern_of", "read_bindings", "removing"]

Key = tuple[str, str]
"""Topic and group."""
Pattern = tuple[Kind, str]


def pattern_of(binding: Binding) -> Pattern:
    """Return what tells one binding of a group in a topic from another."""
    return binding.kind, binding.pattern


@dataclass(eq=False, slots=True)
class Change:
    """What is to be done to a group's bindings in a topic. wishes: by pattern; None removes.

    error: why it cannot be done.
    """

    wishes: dict[Pattern, Binding | None]
    error: Refused | None = None


def merging(bindings: Iterable[Binding]) -> Change:
    """Return the change that adds or updates these."""
    return Change({pattern_of(binding): replace(binding, start="latest") for binding in bindings})


def removing(bindings: Iterable[Binding]) -> Change:
    """Return the change that removes those of the same kind and pattern."""
    return Change({pattern_of(binding): None for binding in bindings})


def read_bindings(topic: str, group: str, content: bytes) -> tuple[Binding, ...]:
    """Return the bindings that a node holds, all of them usable. Raises `ValueError`."""
    bindings = tuple(one.binding for one in decode_entries(topic, group, content))
    _check(bindings)
    return bindings


def apply(group: str, entries: Sequence[Entry], change: Change) -> list[Entry] | None:
    """Return the entries after a change, None when it changes nothing.

    What the change does not name stays as it is, with fields that this version does not know.
    Raises `ValueError` when bindings would contradict each other.
    """
    by_pattern = {pattern_of(one.binding): one for one in entries}
    changed = False
    for pattern, wish in change.wishes.items():
        old = by_pattern.get(pattern)
        if wish is None:
            changed |= by_pattern.pop(pattern, None) is not None
        elif old is None or old.binding != wish:
            by_pattern[pattern] = entry(group, wish)
            changed = True
    if not changed:
        return None
    _check([one.binding for one in by_pattern.values()])
    return list(by_pattern.values())


def _check(bindings: Sequence[Binding]) -> None:
    check_agreement(bindings)
    for binding in bindings:
        Matcher(binding)
