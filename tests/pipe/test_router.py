"""Who gets a message, and what a change of bindings may and may not do."""

from __future__ import annotations

from collections import Counter

import pytest

from kiteq.binding.bindings import Binding, direct, fanout, regex
from kiteq.clock import SystemClock
from kiteq.config import Settings
from kiteq.errors import Refused
from kiteq.limits import TOPICS_MAX
from kiteq.message import Head
from kiteq.pipe import router as router_module
from kiteq.pipe.deliveries import Deliveries
from kiteq.pipe.router import Router
from kiteq.pipe.turn import Turn
from tests.pipe.parts import make_peer
from tests.store.reopening import KeptTables, OpenStore


class Routing:
    """A router over a store that a test commits by hand."""

    def __init__(self, tables: KeptTables | None = None, served: tuple[str, ...] = ()) -> None:
        self.opened = OpenStore(tables or KeptTables())
        store = self.opened.store
        turn = Turn(store, lambda _peer: None)
        self.deliveries = Deliveries(store, SystemClock(), Settings(), turn, Counter())
        self.router = Router(store, self.deliveries, served)

    def bind(self, group: str, *bindings: Binding) -> None:
        changes = self.router.merged(group, bindings)
        new = {topic for topic in changes if not self.router.known(group, topic)}
        outlets = {topic: self.router.new_outlet(group, topic, changes[topic]) for topic in new}
        self.router.put(group, changes, outlets, self.opened.outcomes.append)

    def groups(self, topic: str, message_type: str) -> list[str]:
        head = Head(topic, message_type, 1_000, 100, 0)
        prefix = f"{topic}/{message_type}".encode()
        kind = self.router.kind(prefix) or self.router.new_kind(prefix, head)
        return [outlet.group.name for outlet in self.router.route(kind)]


def test_each_kind_of_binding_matches_and_a_group_gets_a_message_once() -> None:
    routing = Routing()
    routing.bind("exact", direct("trade", "pay-succ"))
    routing.bind("pattern", regex("trade", "pay-.*"), direct("trade", "pay-succ"))
    routing.bind("all", fanout("trade"))
    routing.opened.commit()
    assert routing.groups("trade", "pay-succ") == ["exact", "pattern", "all"]
    assert routing.groups("trade", "pay-fail") == ["pattern", "all"]
    assert routing.groups("trade", "xpay-fail") == ["all"], "a pattern matches the whole type"
    assert routing.groups("feed", "pay-succ") == []


def test_a_new_group_is_routed_to_behind_its_row_and_a_change_when_it_is_durable() -> None:
    routing = Routing()
    assert routing.groups("trade", "a") == []
    routing.bind("members", direct("trade", "a"))
    assert routing.groups("trade", "a") == ["members"]
    routing.bind("members", direct("trade", "b"))
    assert routing.groups("trade", "b") == []
    routing.opened.commit()
    assert routing.groups("trade", "b") == ["members"]


def test_bindings_add_up_and_survive_a_restart() -> None:
    routing = Routing()
    routing.bind("members", direct("trade", "a"))
    routing.bind("members", direct("trade", "b"))
    routing.bind("members", direct("feed", "a"))
    routing.opened.commit()
    for now in (routing, Routing(routing.opened.tables)):
        found = [now.groups(*place) for place in (("trade", "a"), ("trade", "b"), ("trade", "c"), ("feed", "a"))]
        assert found == [["members"], ["members"], [], ["members"]]
        assert len(now.router.outlets()) == 2


def test_two_connections_that_bind_at_once_make_one_subscription() -> None:
    routing = Routing()
    routing.bind("members", direct("trade", "a"))
    routing.bind("members", direct("trade", "a"), direct("trade", "b"))
    routing.opened.commit()
    assert len(routing.router.outlets()) == 1
    assert routing.groups("trade", "b") == ["members"]
    assert len(routing.opened.again().store.subscriptions) == 1


@pytest.mark.parametrize(
    ("bindings", "code"),
    [
        ((direct("trade", "a", watermark=5), direct("trade", "b", watermark=6)), "binding_conflict"),
        ((direct("trade", "a", persistent=False), direct("trade", "b")), "binding_conflict"),
        ((regex("trade", "(a"),), "bad_pattern"),
        ((fanout("other"),), "topic_not_served"),
    ],
)
def test_what_cannot_be_bound_is_refused_and_changes_nothing(bindings: tuple[Binding, ...], code: str) -> None:
    routing = Routing(served=("trade",))
    with pytest.raises(Refused) as refused:
        routing.bind("members", *bindings)
    assert refused.value.code == code
    assert not routing.router.known("members", "trade")


def test_a_binding_that_contradicts_one_from_before_is_refused() -> None:
    routing = Routing()
    routing.bind("members", direct("trade", "a"))
    with pytest.raises(Refused, match="watermark"):
        routing.bind("members", direct("trade", "b", watermark=5))


def test_bindings_are_counted_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "BINDINGS_MAX", 3)
    routing = Routing()
    routing.bind("members", direct("trade", "a"), direct("trade", "b"))
    routing.bind("members", direct("trade", "a"))
    routing.bind("members", direct("trade", "c"))
    routing.opened.commit()
    again = Routing(routing.opened.tables)
    for one in (routing, again):
        with pytest.raises(Refused, match="bindings already"):
            one.bind("points", fanout("trade"))


def test_topics_are_bounded() -> None:
    routing = Routing()
    for number in range(TOPICS_MAX):
        routing.opened.store.topic(f"t{number}")
    routing.router.check_served("t5")
    with pytest.raises(Refused, match="topics already"):
        routing.router.check_served("one-more")


def test_a_group_that_left_is_not_routed_to_and_comes_back_as_a_new_one() -> None:
    routing = Routing()
    routing.bind("members", fanout("trade"))
    routing.opened.commit()
    (outlet,) = routing.router.outlets()
    routing.router.close(outlet)
    assert routing.groups("trade", "a") == []
    routing.bind("members", direct("trade", "a"))
    routing.opened.commit()
    (again,) = routing.router.outlets()
    assert again.subscription.number > outlet.subscription.number
    assert routing.groups("trade", "a") == ["members"]


def test_temporary_bindings_match_while_somebody_is_there() -> None:
    routing = Routing()
    routing.bind("members", fanout("trade", persistent=False))
    routing.opened.commit()
    assert routing.groups("trade", "a") == []
    routing.deliveries.group("members").members.append(make_peer())
    routing.router.forget_routes()
    assert routing.groups("trade", "a") == ["members"]
