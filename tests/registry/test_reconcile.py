"""Three versions of a group's bindings - seen last in the registry, there now, here - become one."""

from __future__ import annotations

from itertools import product

import pytest

from kiteq.binding.bindings import Binding, direct
from kiteq.pipe.registration import ByPattern, reconcile
from kiteq.registry.merging import pattern_of

SLOW, FAST = direct("trade", "pay", watermark=10), direct("trade", "pay", watermark=1000)
STATES = [None, SLOW, FAST]


def held(*bindings: Binding | None) -> ByPattern:
    return {pattern_of(one): one for one in bindings if one is not None}


@pytest.mark.parametrize(("seen", "shared", "here"), list(product(STATES, repeat=3)))
def test_both_sides_end_with_the_same(seen: Binding | None, shared: Binding | None, here: Binding | None) -> None:
    found = reconcile(held(seen), held(shared), held(here))

    here_after = found.bind_here[0] if found.bind_here else None if found.unbind_here else here
    shared_after = found.bind_shared[0] if found.bind_shared else None if found.unbind_shared else shared

    assert here_after == shared_after
    assert len([part for part in found if part]) <= 1, "one side follows the other"
    if seen in (shared, here):
        changed = here if shared == seen else shared
        assert here_after == changed, "the only side that has changed something is followed"
    elif shared is not None or here is not None:
        assert here_after is not None, "what was changed on both sides stays bound"


def test_start_is_of_the_moment() -> None:
    here = direct("trade", "pay", watermark=10, start="first")

    assert not any(reconcile(held(SLOW), held(SLOW), held(here)))
    assert reconcile(held(), held(), held(here)).bind_shared == [SLOW]


def test_each_binding_is_looked_at_alone() -> None:
    kept, added, removed = direct("trade", "kept"), direct("trade", "added"), direct("trade", "removed")

    found = reconcile(held(kept, removed), held(kept, SLOW), held(kept, removed, added))

    assert (found.bind_here, found.unbind_here) == ([SLOW], [removed])
    assert (found.bind_shared, found.unbind_shared) == ([added], [])
