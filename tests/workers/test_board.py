"""What the workers of a set share."""

from __future__ import annotations

import pytest

from kiteq.binding.bindings import direct, fanout, regex
from kiteq.errors import Refused
from kiteq.workers import board as board_module
from kiteq.workers.board import Board

KEY = ("trade", "g")
ONE = direct("trade", "one")
TWO = direct("trade", "two")


def test_a_binding_is_shared_once_and_without_its_start() -> None:
    board = Board()
    assert board.merge(KEY, [direct("trade", "one", start="first")])
    assert not board.merge(KEY, [ONE])
    assert board.nodes == {KEY: (ONE,)}


def test_what_contradicts_is_refused_and_changes_nothing() -> None:
    board = Board()
    board.merge(KEY, [ONE])
    with pytest.raises(Refused, match="they must agree") as caught:
        board.merge(KEY, [direct("trade", "two", watermark=5)])
    assert caught.value.code == "binding_conflict"
    assert board.nodes == {KEY: (ONE,)}


def test_stores_add_up() -> None:
    board = Board()
    assert board.learn(KEY, [ONE])
    assert board.learn(KEY, [ONE, TWO])
    assert not board.learn(KEY, [TWO])
    assert board.nodes == {KEY: (ONE, TWO)}


def test_a_store_does_not_change_what_is_known_already() -> None:
    board = Board()
    board.merge(KEY, [fanout("trade", watermark=5)])
    assert not board.learn(KEY, [fanout("trade", watermark=6)])
    with pytest.raises(Refused):
        board.learn(KEY, [ONE])
    assert board.nodes == {KEY: (fanout("trade", watermark=5),)}


def test_a_store_does_not_bring_back_what_was_removed() -> None:
    board = Board()
    board.learn(KEY, [ONE, TWO])
    assert board.remove(KEY, [ONE]) == [KEY]
    assert not board.learn(KEY, [ONE, TWO])
    assert board.nodes == {KEY: (TWO,)}
    assert board.remove(KEY, [TWO]) == [KEY]
    assert board.nodes == {KEY: ()}
    assert board.merge(KEY, [ONE])
    assert board.remove(("trade", "other"), []) == [("trade", "other")]


def test_what_only_a_worker_that_is_down_has_can_be_removed() -> None:
    board = Board()
    assert board.remove(KEY, [regex("trade", "a.*")]) == [KEY]
    assert board.remove(KEY, [regex("trade", "a.*")]) == []
    assert not board.learn(KEY, [regex("trade", "a.*")])
    assert board.nodes == {KEY: ()}


def test_what_was_bound_again_is_learned_again() -> None:
    board = Board()
    board.merge(KEY, [ONE])
    board.remove(KEY, [ONE])
    board.merge(KEY, [ONE])
    board.remove(KEY, [TWO])
    assert not board.learn(KEY, [ONE, TWO])
    assert board.nodes == {KEY: (ONE,)}


def test_the_oldest_removals_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "REMOVED_MAX", 2)
    board = Board()
    keys = [("trade", f"g{number}") for number in range(3)]
    for key in keys[:2]:
        board.merge(key, [ONE])
        assert board.remove(key, [ONE]) == [key]
    board.merge(keys[2], [ONE])
    assert board.remove(keys[2], [ONE]) == [keys[2], keys[0]]
    assert board.nodes == {keys[1]: (), keys[2]: ()}
    assert board.learn(keys[0], [ONE])
