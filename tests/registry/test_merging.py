"""Changes of bindings as pure functions."""

from __future__ import annotations

import pytest

from kiteq.binding.bindings import Binding, direct, fanout, regex
from kiteq.registry.layout import Entry, encode_entries, entry
from kiteq.registry.merging import Change, apply, merging, read_bindings, removing

A, B, C = direct("t", "a"), direct("t", "b"), fanout("t")


def entries(*bindings: Binding) -> list[Entry]:
    return [entry("g", binding) for binding in bindings]


def bindings_of(found: list[Entry] | None) -> list[Binding] | None:
    return None if found is None else [one.binding for one in found]


def test_merging_keeps_what_is_there() -> None:
    assert bindings_of(apply("g", entries(A), merging([B, C]))) == [A, B, C]
    assert bindings_of(apply("g", [], merging([B]))) == [B]


def test_merging_what_is_there_changes_nothing() -> None:
    assert apply("g", entries(A, B), merging([A])) is None
    assert apply("g", entries(A), merging([direct("t", "a", start="first")])) is None
    assert apply("g", entries(A), Change({})) is None


def test_merging_updates_a_binding_of_the_same_kind_and_pattern() -> None:
    assert bindings_of(apply("g", entries(A), merging([direct("t", "a", watermark=5)]))) == [
        direct("t", "a", watermark=5)
    ]


def test_what_is_not_named_keeps_fields_of_a_later_version() -> None:
    later = Entry(A, entry("g", A).fields | {"later": 1})
    assert apply("g", [later], merging([B])) == [later, *entries(B)]


def test_bindings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="must agree"):
        apply("g", entries(A), merging([direct("t", "b", persistent=False)]))


def test_an_invalid_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid RE2"):
        apply("g", [], merging([regex("t", "(")]))
    with pytest.raises(ValueError, match="not valid RE2"):
        read_bindings("t", "g", encode_entries(entries(regex("t", "("))))


def test_removing_leaves_the_rest_even_if_that_is_nothing() -> None:
    assert bindings_of(apply("g", entries(A, B), removing([A]))) == [B]
    assert bindings_of(apply("g", entries(A), removing([A]))) == []
    assert apply("g", entries(A), removing([B])) is None
