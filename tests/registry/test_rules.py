"""What a broker takes from a registry and gives to it, against one in memory that a test holds in its hands."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from kiteq import clustering
from kiteq.binding.bindings import direct, fanout
from kiteq.errors import Refused
from kiteq.pipe import router
from kiteq.pipe.registration import unbind_shared
from tests.e2e.wire import connect, numbered
from tests.registry.parts import WAIT_SECONDS, until
from tests.registry.shelf import KEY, Shelf, applied, bound, joined

pytestmark = pytest.mark.slow


async def test_what_is_refused_here_stays_in_the_registry_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf()
    monkeypatch.setattr(router, "BINDINGS_MAX", 3)
    async with joined(tmp_path, shelf) as broker:
        shelf.board.merge(KEY, [direct("t", name) for name in "abcd"])
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == (set("abcd"), set())

        monkeypatch.undo()
        await applied(broker, shelf)
        assert bound(broker) == set("abcd")


async def test_a_topic_taken_off_the_list_of_one_broker_stays_bound_at_the_others(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.board.merge(KEY, [direct("t", "a")])
    async with joined(tmp_path, shelf, topics=("u",)) as broker:
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"a"}, set())


async def test_what_contradicts_the_registry_after_an_outage_gives_way_to_it(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        shelf.away = True
        client = await connect(broker, "g", direct("t", "a", watermark=10))
        await client.publish(numbered(1))
        shelf.board.merge(KEY, [direct("t", "b", watermark=20)])
        shelf.come_back()
        shelf.tell()
        await until(lambda: bound(broker) == {"b"})
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"b"}, {"b"})
        assert (await client.row("g"))["pending"] == 1


async def test_all_topics_that_are_bound_during_an_outage_are_shared_after_it(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        shelf.away = True
        await connect(broker, "g", direct("t", "a"), direct("u", "b"))
        shelf.come_back()
        await until(lambda: (shelf.patterns(), shelf.patterns(("u", "g"))) == ({"a"}, {"b"}))


@pytest.mark.parametrize("drop", [False, True])
async def test_what_is_removed_and_bound_again_during_an_outage_stays_bound(tmp_path: Path, *, drop: bool) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        client = await connect(broker, "g", direct("t", "a"))
        await applied(broker, shelf)
        shelf.away = True
        if drop:
            await client.admin("group.drop", group="g")
        else:
            await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="a")
        await connect(broker, "g", direct("t", "a"))
        shelf.come_back()
        shelf.tell()
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"a"}, {"a"})


async def test_a_binding_that_is_made_again_at_this_moment_is_not_taken_for_removed(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        client = await connect(broker, "g", direct("t", "a"))
        await applied(broker, shelf)
        shelf.away = True
        await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="a")
        shelf.forget_asked()
        shelf.away = False
        shelf.may_answer = trio.Event()
        shelf.is_quiet = True
        looks = shelf.looks
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, broker, "g", direct("t", "a"))
            registration = broker.core.registration
            await until(lambda: registration is not None and registration._coming)
            shelf.tell()
            await until(lambda: shelf.looks > looks)
            shelf.may_answer.set()
        shelf.is_quiet = False
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"a"}, {"a"})


async def test_a_binding_that_takes_over_what_was_kept_is_not_taken_for_removed_meanwhile(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        producer = await connect(broker, "p", topics=["t"])
        for start in range(0, 10_000, 500):
            await producer.publish(numbered(500, start=start))
        is_bound = trio.Event()

        async def two_members_connect() -> None:
            async with trio.open_nursery() as members:
                for _ in range(2):
                    members.start_soon(connect, broker, "g", fanout("t", start="first"))
            is_bound.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(two_members_connect)
            while not is_bound.is_set():
                shelf.tell()
                await trio.lowlevel.checkpoint()
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == ({"*"}, {"*"})
        assert (await producer.row("g"))["pending"] == 10_000


async def test_a_removal_that_the_registry_refuses_holds_here(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        client = await connect(broker, "g", direct("t", "a"), direct("t", "b"))
        shelf.refusal = Refused("binding_conflict", "what is left contradicts itself: somebody wrote it by hand")
        await client.admin("group.unsubscribe", group="g", topic="t", kind="direct", pattern="a")
        assert bound(broker) == {"b"}


async def test_a_broker_that_ends_while_a_binding_is_removed_ends_well(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        await connect(broker, "g", direct("t", "a"), direct("t", "b"))
        await applied(broker, shelf)
        assert unbind_shared(broker.core, "g", "t", 0, "a", lambda _error: None)
    async with joined(tmp_path, shelf) as broker:
        await until(lambda: bound(broker) == {"b"})
        await applied(broker, shelf)
        assert shelf.patterns() == {"b"}


async def test_what_another_registry_lacks_was_not_removed_from_it(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        await connect(broker, "g", direct("t", "a"), direct("t", "b"))
        await applied(broker, shelf)
    wiped = Shelf()
    wiped.identity = "second"
    wiped.board.merge(KEY, [direct("t", "a")])  # by a broker that was down when "b" was bound
    wiped.away = True
    async with joined(tmp_path, wiped) as broker:
        wiped.come_back()
        wiped.tell()
        await until(lambda: wiped.patterns() == {"a", "b"})
        await applied(broker, wiped)
        assert (wiped.patterns(), bound(broker)) == ({"a", "b"}, {"a", "b"})


async def test_what_is_removed_from_another_registry_that_held_the_same_is_removed_here(tmp_path: Path) -> None:
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        await connect(broker, "g", direct("t", "a"))
        await applied(broker, shelf)
        shelf.identity = "second"
        await applied(broker, shelf)
        shelf.board.remove(KEY, [direct("t", "a")])
        await applied(broker, shelf)
        assert (shelf.patterns(), bound(broker)) == (set(), set())


async def test_a_broker_is_announced_only_when_the_bindings_of_the_registry_are_in_force(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.away = True
    shelf.board.merge(KEY, [direct("t", "a")])
    async with joined(tmp_path, shelf) as broker:
        await trio.testing.wait_all_tasks_blocked()
        shelf.come_back()
        await trio.testing.wait_all_tasks_blocked()
        assert (shelf.announced, bound(broker)) == ([], set())
        shelf.tell()
        await until(lambda: shelf.announced)
        assert bound(broker) == {"a"}


async def test_a_broker_that_drains_before_it_was_announced_is_not_announced_any_more(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.away = True
    async with joined(tmp_path, shelf) as broker:
        consumer = await connect(broker, "g", direct("t", "a"))
        await consumer.credit(1)
        await consumer.publish(numbered(1))
        await consumer.take(1)  # holds the drain up
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker.drain)
            await until(lambda: broker.core.draining)
            shelf.come_back()
            shelf.tell()
            registration = broker.core.registration
            await until(lambda: registration is not None and registration.applied.is_set())
            await trio.testing.wait_all_tasks_blocked()
            assert shelf.announced == []
            await consumer.goodbye()


async def test_who_publishes_during_an_outage_does_not_make_the_broker_one_that_is_not_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "PUBLISHERS_SECONDS", 0.01)
    shelf = Shelf()
    async with joined(tmp_path, shelf) as broker:
        await until(lambda: shelf.announced)
        shelf.away = True
        with capture_logs() as logs:
            await connect(broker, "p", topics=["t"])
            await until(lambda: shelf.publishers == {("t", "p")})
        assert [line["event"] for line in logs if line["log_level"] == "warning"] == []


async def test_a_registry_that_goes_away_while_it_is_read_does_not_hold_up_the_start(tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.is_slow = True
    async with trio.open_nursery() as nursery:

        async def go_away() -> None:
            await trio.testing.wait_all_tasks_blocked()
            shelf.away = True

        nursery.start_soon(go_away)
        with trio.fail_after(WAIT_SECONDS):
            async with joined(tmp_path, shelf) as broker:
                await connect(broker, "g", direct("t", "a"))
