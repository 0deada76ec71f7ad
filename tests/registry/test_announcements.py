"""Announcements in a real ZooKeeper: there as long as the broker is, whatever happens to sessions."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import pytest
import trio

from kiteq.registry.announcements import may_replace
from kiteq.registry.errors import AddressTaken
from kiteq.registry.layout import Server, decode_server, encode_server
from tests.registry.parts import (
    ADDRESS,
    SERVER,
    SESSION_SECONDS,
    ListLog,
    expire,
    in_thread,
    opened,
    session_of,
    until,
    until_told,
)  # fmt: skip

pytestmark = pytest.mark.slow

NODE = f"/kiteq/server/trade/{ADDRESS}"


def there(hand: Any, node: str = NODE) -> Server | None:
    return None if hand.exists(node) is None else decode_server(hand.get(node)[0])


def test_an_announcement_is_replaced_by_the_same_broker_only_and_not_by_an_earlier_start() -> None:
    assert may_replace(SERVER, SERVER, is_own_session=True)
    assert not may_replace(SERVER, SERVER, is_own_session=False)
    assert may_replace(replace(SERVER, epoch=6), SERVER, is_own_session=False)
    assert not may_replace(replace(SERVER, epoch=8), SERVER, is_own_session=False)
    assert not may_replace(replace(SERVER, broker_id="other", epoch=1), SERVER, is_own_session=False)


async def test_a_broker_is_found_until_it_leaves(url: str, hand: Any) -> None:
    async with opened(url) as watching:
        async with opened(url) as registry:
            await registry.announce(ADDRESS, SERVER, ["trade", "pay"])
            assert there(hand) == SERVER
            both = {"trade": {ADDRESS: SERVER}, "pay": {ADDRESS: SERVER}}
            await until_told(watching, lambda snapshot: snapshot.servers == both)
            await registry.announce(ADDRESS, SERVER, ["trade"])
            await until_told(watching, lambda snapshot: snapshot.servers["pay"] == {})
        await until_told(watching, lambda snapshot: snapshot.servers["trade"] == {})
        assert there(hand) is None


async def test_a_broker_of_every_topic_has_one_node(url: str, hand: Any) -> None:
    async with opened(url) as registry:
        await registry.announce(ADDRESS, SERVER)
        assert hand.get_children("/kiteq/server") == ["*"]
        assert hand.get_children("/kiteq/server/*") == [ADDRESS]


async def test_1000_topics_are_announced_and_withdrawn(url: str, hand: Any) -> None:
    async with opened(url, servers_of=()) as registry:
        await registry.announce(ADDRESS, SERVER, [f"topic-{number}" for number in range(1_000)], timeout=20.0)
        assert len(hand.get_children("/kiteq/server")) == 1_000
        await registry.withdraw(timeout=20.0)
        assert hand.get_children("/kiteq/server/topic-999") == []
        assert not registry.state.degraded


async def test_what_is_announced_anew_replaces_what_was_said_before(url: str, hand: Any) -> None:
    async with opened(url) as registry:
        await registry.announce(ADDRESS, SERVER, ["trade"])
        changed = replace(SERVER, partitions=(1, 2))
        await registry.announce(ADDRESS, changed, ["trade"])
        assert there(hand) == changed


async def test_publishers_are_announced_beside_servers(url: str, hand: Any) -> None:
    async with opened(url) as registry:
        await registry.announce(ADDRESS, SERVER, ["trade"])
        await registry.announce_publishers(ADDRESS, SERVER, [("trade", "shop"), ("trade", "till")])
        assert sorted(hand.get_children("/kiteq/pub/trade")) == ["shop", "till"]
        await registry.announce_publishers(ADDRESS, SERVER, [("trade", "shop")])
        assert hand.get_children("/kiteq/pub/trade/till") == []
        assert there(hand, f"/kiteq/pub/trade/shop/{ADDRESS}") == SERVER
        assert there(hand) == SERVER


async def test_a_lost_session_is_replaced_and_so_are_its_nodes(url: str, hand: Any) -> None:
    async with opened(url) as registry:
        await registry.announce(ADDRESS, SERVER, ["trade"])
        for _ in range(3):
            owner = hand.exists(NODE).ephemeralOwner
            await in_thread(expire, registry)
            await until(lambda owner=owner: (node := hand.exists(NODE)) and node.ephemeralOwner != owner)  # type: ignore[misc]
        assert there(hand) == SERVER


async def test_a_node_that_somebody_deletes_or_changes_comes_back(url: str, hand: Any) -> None:
    async with opened(url) as registry:
        await registry.announce(ADDRESS, SERVER, ["trade"])
        hand.delete(NODE)
        await until(lambda: hand.exists(NODE))
        hand.set(NODE, b"{}")
        await until(lambda: hand.exists(NODE) and there_or_none(hand) == SERVER)
        hand.delete("/kiteq/server", recursive=True)
        await until(lambda: hand.exists(NODE))


def there_or_none(hand: Any) -> Server | None:
    try:
        return there(hand)
    except ValueError:
        return None


async def test_restarting_within_the_session_timeout_replaces_our_own_old_node(url: str, hand: Any) -> None:
    before = replace(SERVER, epoch=6)
    hand.create(NODE, encode_server(before), ephemeral=True, makepath=True)  # as a killed process leaves it
    old = hand.exists(NODE)
    async with opened(url) as registry:
        start = time.monotonic()
        await registry.announce(ADDRESS, SERVER, ["trade"])
        assert time.monotonic() - start < SESSION_SECONDS
        assert there(hand) == SERVER
        assert hand.exists(NODE).ephemeralOwner == session_of(registry).session_id != old.ephemeralOwner


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode_server(replace(SERVER, broker_id="other")), "the broker other has announced itself"),
        (encode_server(replace(SERVER, epoch=8)), "a later start of this broker"),
        (encode_server(SERVER), "another process as this broker .* a copy of its store"),
        (b"{}", "not ours"),
    ],
    ids=["another-broker", "later-start", "copied-store", "malformed"],
)
async def test_the_node_of_another_broker_is_waited_for(url: str, hand: Any, content: bytes, reason: str) -> None:
    hand.create(NODE, content, ephemeral=True, makepath=True)
    log = ListLog()
    async with opened(url, log) as registry:
        with pytest.raises(AddressTaken, match=reason):
            await registry.announce(ADDRESS, SERVER, ["trade", "pay"], timeout=1.0)
        assert hand.get(NODE)[0] == content
        await until(lambda: not registry._attachment._waiting)
        assert there(hand, f"/kiteq/server/pay/{ADDRESS}") == SERVER
        assert registry.state.degraded
        assert re.search(reason, registry.state.reason)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: registry.announce(ADDRESS, SERVER, ["trade", "pay"]))
                hand.delete(NODE)
        assert there(hand) == SERVER
        await until(lambda: not registry.state.degraded)
    assert [event for event, _ in log.warnings].count("this broker cannot be announced") == 1


async def test_of_two_starts_of_one_broker_the_later_one_stays(url: str, hand: Any) -> None:
    later = replace(SERVER, epoch=8)
    async with opened(url) as old, opened(url) as new:
        await old.announce(ADDRESS, SERVER, ["trade"])
        await new.announce(ADDRESS, later, ["trade"])
        await until(lambda: "later start" in old.state.reason)
        assert there(hand) == later
