"""Bindings in a real ZooKeeper: merged by several brokers at once, watched, and never lost by accident."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Any

import pytest
import trio

from kiteq.binding.bindings import Binding, direct, fanout, regex
from kiteq.errors import Refused
from kiteq.registry import subscriptions
from kiteq.registry.errors import RegistryUnavailable, UnreadableNode
from kiteq.registry.layout import decode_entries, encode_entries, encode_server, entry
from tests.registry.parts import ADDRESS, SERVER, WAIT_SECONDS, ListLog, expire, in_thread, opened, until, until_told
from tests.support.zookeeper import ZooKeeperProcess

pytestmark = pytest.mark.slow

A, B, C = direct("t", "a"), direct("t", "b"), fanout("t")
KEY = ("t", "g")
NODE = "/kiteq/sub/t/g-bind"


def held(hand: Any, node: str = NODE) -> list[Binding]:
    """Return the bindings that a node holds."""
    _, _, _, topic, name = node.split("/")
    return [one.binding for one in decode_entries(topic, name.removesuffix("-bind"), hand.get(node)[0])]


async def test_what_is_merged_is_there_and_another_broker_is_told_within_a_second(url: str, hand: Any) -> None:
    async with opened(url) as one, opened(url) as other:
        assert (await other.wait_changed()).bindings == {}
        await one.merge_bindings("g", "t", [A])
        with trio.fail_after(1):
            assert (await other.wait_changed()).bindings == {KEY: (A,)}
        await one.merge_bindings("g", "t", [B])
        assert held(hand) == [A, B]
        assert json.loads(hand.get(NODE)[0])[0]["groupId"] == "g"
        with trio.fail_after(1):
            assert (await other.wait_changed()).bindings == {KEY: (A, B)}


async def test_what_was_merged_is_in_what_is_told_from_then_on(url: str) -> None:
    async with opened(url) as registry:
        for number in range(50):
            binding = direct("t", f"type-{number}")
            await registry.merge_bindings("g", "t", [binding])
            assert registry._attachment.view is not None
            assert binding in (registry._attachment.view.bindings[KEY] or ())


async def test_what_was_removed_is_a_list_that_lacks_it(url: str, hand: Any) -> None:
    async with opened(url) as one, opened(url) as other:
        await one.merge_bindings("g", "t", [A, B])
        await other.remove_binding("g", "t", [A])
        assert held(hand) == [B]
        await until_told(one, lambda snapshot: snapshot.bindings[KEY] == (B,))
        await other.remove_binding("g", "t", [B, C])
        assert held(hand) == []
        await until_told(one, lambda snapshot: snapshot.bindings[KEY] == ())


async def test_removing_where_nothing_is_says_so_for_others(url: str, hand: Any) -> None:
    async with opened(url, known={KEY: [A, B]}, bindings_of=["other"]) as registry:
        await registry.remove_binding("g", "t", [A])
        assert held(hand) == [B]


async def test_20_writers_at_once_lose_nothing(url: str, hand: Any) -> None:
    async with AsyncExitStack() as stack:
        writers = [await stack.enter_async_context(opened(url, timeout=20.0)) for _ in range(20)]
        async with trio.open_nursery() as nursery:
            for number, writer in enumerate(writers):
                for part in range(3):
                    binding = direct("t", f"type-{number}-{part}")
                    nursery.start_soon(partial(writer.merge_bindings, "g", "t", [binding], timeout=20.0))
        assert {one.pattern for one in held(hand)} == {f"type-{n}-{part}" for n in range(20) for part in range(3)}
        for writer in writers:
            await until_told(writer, lambda snapshot: len(snapshot.bindings.get(KEY) or ()) == 60)


async def test_merging_and_removing_at_once_lose_nothing_else(url: str, hand: Any) -> None:
    keep = [direct("t", f"keep-{number}") for number in range(10)]
    gone = [direct("t", f"gone-{number}") for number in range(10)]
    async with opened(url) as one, opened(url) as other:
        await one.merge_bindings("g", "t", gone)
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(one.merge_bindings, "g", "t", [keep[number]])
                nursery.start_soon(other.remove_binding, "g", "t", [gone[number]])
        assert set(held(hand)) == set(keep)


async def test_members_that_bring_the_same_contradiction_at_once_are_all_refused(url: str, hand: Any) -> None:
    async with opened(url) as one, opened(url) as other:
        await one.merge_bindings("g", "t", [A])
        refused: list[str] = []

        async def connect(*bindings: Binding) -> None:
            try:
                await other.merge_bindings("g", "t", bindings)
            except Refused as error:
                refused.append(error.reason)

        slow = direct("t", "b", watermark=10)
        async with trio.open_nursery() as nursery:
            for bindings in ([slow], [slow], [direct("t", "c", watermark=10), slow], [slow]):
                nursery.start_soon(connect, *bindings)
        assert len(refused) == 4
        assert held(hand) == [A]


async def test_bindings_that_contradict_those_of_another_broker_are_refused(url: str, hand: Any) -> None:
    async with opened(url) as one, opened(url) as other:
        await one.merge_bindings("g", "t", [A])
        with pytest.raises(Refused, match=r"must agree \[binding_conflict\]"):
            await other.merge_bindings("g", "t", [direct("t", "b", persistent=False)])
        assert held(hand) == [A]
        await other.merge_bindings("g", "t", [B])
        assert held(hand) == [A, B]


async def test_of_changes_made_together_only_the_contradicting_one_is_refused(url: str, hand: Any) -> None:
    async with opened(url) as registry:
        await registry.merge_bindings("g", "t", [A])
        async with trio.open_nursery() as nursery:

            async def contradict() -> None:
                with pytest.raises(Refused, match="must agree"):
                    await registry.merge_bindings("g", "t", [direct("t", "x", watermark=5)])

            nursery.start_soon(registry.merge_bindings, "g", "t", [B])
            nursery.start_soon(contradict)
            nursery.start_soon(registry.merge_bindings, "g", "t", [C])
        assert set(held(hand)) == {A, B, C}


async def test_a_snapshot_from_before_a_merge_says_nothing_of_it(url: str) -> None:
    async with opened(url) as one, opened(url) as other:
        await one.merge_bindings("g", "t", [A])
        await until_told(other, lambda snapshot: snapshot.bindings)
        await one.merge_bindings("h", "t", [A])
        await until(lambda: other._attachment.view is not None and len(other._attachment.view.bindings) == 2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.merge_bindings, "g", "t", [B])
            await trio.lowlevel.checkpoint()
            snapshot = await other.wait_changed()
            assert snapshot.bindings["t", "g"] in {None, (A, B)}
            assert snapshot.bindings["t", "h"] == (A,)
        await until_told(other, lambda snapshot: snapshot.bindings["t", "g"] == (A, B))


async def test_malformed_nodes_are_left_out_with_one_warning_each(url: str, hand: Any) -> None:
    log = ListLog()
    hand.create("/kiteq/sub/t/bad-bind", b"{", makepath=True)
    hand.create("/kiteq/sub/t/pattern-bind", encode_entries([entry("pattern", regex("t", "("))]))
    hand.create("/kiteq/sub/t/unknown", b"something else")
    hand.create("/kiteq/sub/-strange/x-bind", b"[]", makepath=True)
    hand.create("/kiteq/server/t/1.2.3.4:5", b"", makepath=True)
    for name in ("foo", "f\u00fc[:1", "a..b:1"):
        hand.create(f"/kiteq/server/t/{name}", encode_server(SERVER))
    async with opened(url, log) as registry:
        await registry.merge_bindings("g", "t", [A])
        snapshot = await until_told(registry, lambda snapshot: KEY in snapshot.bindings)
        assert snapshot.bindings == {KEY: (A,), ("t", "bad"): None, ("t", "pattern"): None}
        assert snapshot.servers == {"t": {}}
        await in_thread(expire, registry)  # all is read again
        hand.create("/kiteq/sub/t/h-bind", encode_entries([entry("h", A)]))
        await until_told(registry, lambda snapshot: ("t", "h") in snapshot.bindings)
        hand.set("/kiteq/sub/t/bad-bind", b"[5]")
        await until(lambda: log.named().count("/kiteq/sub/t/bad-bind") == 2)
    assert sorted(map(str, log.named())) == [
        "/kiteq/server/t/1.2.3.4:5",
        "/kiteq/server/t/a..b:1",
        "/kiteq/server/t/foo",
        "/kiteq/server/t/f\u00fc[:1",
        "/kiteq/sub/-strange",
        "/kiteq/sub/t/bad-bind",
        "/kiteq/sub/t/bad-bind",
        "/kiteq/sub/t/pattern-bind",
    ]


async def test_a_malformed_node_is_not_overwritten_and_is_written_once_it_is_deleted(url: str, hand: Any) -> None:
    hand.create(NODE, b"{", makepath=True)
    async with opened(url) as registry:
        with pytest.raises(UnreadableNode, match=NODE):
            await registry.merge_bindings("g", "t", [A])
        assert hand.get(NODE)[0] == b"{"
        await until(lambda: NODE in registry.state.reason)
        hand.delete(NODE)
        await in_thread(expire, registry)  # else the next full reading does it
        await until(lambda: hand.exists(NODE))
        assert held(hand) == [A]
        await until(lambda: not registry.state.degraded)


async def test_a_node_that_is_deleted_is_missing_and_filled_in_with_the_next_full_reading(url: str, hand: Any) -> None:
    async with opened(url) as registry:
        await registry.merge_bindings("g", "t", [A])
        await until_told(registry, lambda snapshot: KEY in snapshot.bindings)
        hand.delete(NODE)
        await until_told(registry, lambda snapshot: KEY not in snapshot.bindings)
        await in_thread(expire, registry)
        await until_told(registry, lambda snapshot: snapshot.bindings.get(KEY) == (A,))


async def test_what_the_store_knows_fills_an_empty_registry_only(url: str, hand: Any) -> None:
    hand.create("/kiteq/sub/t/there-bind", encode_entries([entry("there", B)]), makepath=True)
    async with opened(url, known={KEY: [A], ("t", "there"): [A]}) as registry:
        snapshot = await registry.wait_changed()
        assert snapshot.bindings == {KEY: (A,), ("t", "there"): (B,)}
    assert held(hand) == [A]


async def test_what_the_store_knows_of_topics_that_are_not_wanted_fills_nothing(url: str, hand: Any) -> None:
    async with opened(url, known={("v", "g"): [fanout("v")], KEY: [A]}, bindings_of=["t"]) as registry:
        assert (await registry.wait_changed()).bindings == {KEY: (A,)}
        assert hand.exists("/kiteq/sub/v") is None


async def test_only_the_wanted_topics_are_told_of_also_those_that_come_later(url: str, hand: Any) -> None:
    async with opened(url, bindings_of=["t", "u"]) as registry:
        assert (await registry.wait_changed()).bindings == {}
        hand.create("/kiteq/sub/v/g-bind", encode_entries([]), makepath=True)
        hand.create("/kiteq/sub/u/g-bind", encode_entries([entry("g", fanout("u"))]), makepath=True)
        snapshot = await until_told(registry, lambda snapshot: snapshot.bindings)
        assert snapshot.bindings == {("u", "g"): (fanout("u"),)}
        hand.set("/kiteq/sub/u/g-bind", b"[]")
        await until_told(registry, lambda snapshot: snapshot.bindings == {("u", "g"): ()})
        hand.delete("/kiteq/sub/u", recursive=True)
        await until_told(registry, lambda snapshot: snapshot.bindings == {})
        hand.create("/kiteq/sub/u/g-bind", encode_entries([entry("g", fanout("u"))]), makepath=True)
        await until_told(registry, lambda snapshot: snapshot.bindings)


async def test_a_group_with_more_bindings_than_a_node_takes_holds_up_nothing_else(url: str, hand: Any) -> None:
    many = [direct("t", f"type-{number}") for number in range(5_000)]
    async with opened(url, known={KEY: many, ("t", "h"): [A]}) as registry:
        await registry.announce(ADDRESS, SERVER)
        assert held(hand, "/kiteq/sub/t/h-bind") == [A]
        assert "/kiteq/sub/t/g-bind cannot be written" in registry.state.reason
        with pytest.raises(Refused, match="at most 524288 bytes"):
            await registry.merge_bindings("g", "t", [A])
        assert (await registry.wait_changed()).bindings == {("t", "h"): (A,)}


async def test_a_change_that_changes_nothing_is_told(url: str) -> None:
    async with opened(url) as one, opened(url) as other:
        await one.merge_bindings("g", "t", [A])
        await until_told(other, lambda snapshot: snapshot.bindings == {KEY: (A,)})
        await other.merge_bindings("g", "t", [A])
        with trio.fail_after(WAIT_SECONDS):  # what was told while this was asked for was not to be believed
            assert (await other.wait_changed()).bindings == {KEY: (A,)}


async def test_a_registry_that_was_wiped_is_another_one(own_zookeeper: ZooKeeperProcess) -> None:
    url = f"zk://{own_zookeeper.address}/wiped"
    async with opened(url) as one, opened(url) as other:
        before = (await one.wait_changed()).identity
        assert before
        assert (await other.wait_changed()).identity == before
        async with opened(f"{url}/deeper") as elsewhere:
            assert (await elsewhere.wait_changed()).identity not in {before, ""}
        await in_thread(own_zookeeper.kill)
        await in_thread(own_zookeeper.wipe)
        await in_thread(own_zookeeper.start)
        after = (await until_told(one, lambda snapshot: snapshot.identity != before)).identity
        assert (await until_told(other, lambda snapshot: snapshot.identity != before)).identity == after


async def test_watches_go_on_after_a_lost_session(url: str) -> None:
    async with opened(url) as one, opened(url) as other:
        await one.merge_bindings("g", "t", [A])
        await until_told(other, lambda snapshot: snapshot.bindings == {KEY: (A,)})
        await in_thread(expire, other)
        await until(lambda: other.state.degraded is False)
        await one.merge_bindings("g", "t", [B])
        await until_told(other, lambda snapshot: snapshot.bindings == {KEY: (A, B)})
        await one.merge_bindings("h", "new", [fanout("new")])
        await until_told(other, lambda snapshot: snapshot.bindings.get(("new", "h")) == (fanout("new"),))


async def test_a_node_without_bindings_is_kept_for_brokers_that_are_down_and_then_goes(
    url: str, hand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as one:
        await one.merge_bindings("g", "t", [A])
        await one.merge_bindings("bound", "t", [A])
        await one.remove_binding("g", "t", [A])
        async with opened(url):
            assert held(hand) == []
        monkeypatch.setattr(subscriptions, "FORGOTTEN_SECONDS", -60.0)
        async with opened(url):
            await until(lambda: not hand.exists(NODE))
            assert held(hand, "/kiteq/sub/t/bound-bind") == [A]
        expire(one)  # it reads everything anew, and does not write what is gone
        with suppress(RegistryUnavailable):  # it is done when the connection is back
            await one.merge_bindings("bound", "t", [B])
        await until(lambda: held(hand, "/kiteq/sub/t/bound-bind") == [A, B])
        assert not hand.exists(NODE)
