"""A worker's registry, against messages written by hand at its other end."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from kiteq.binding.bindings import direct, to_wire
from kiteq.errors import Refused
from kiteq.registry.errors import RegistryUnavailable
from kiteq.workers import sharing
from kiteq.workers.channel import Channel, Message
from kiteq.workers.sharing import SharedRegistry

KEY = ("trade", "g")
ONE = direct("trade", "one")
TWO = direct("trade", "two")


class OtherEnd:
    """Says what a test says, and keeps what the registry says."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    async def hear(self) -> Message:
        with trio.fail_after(10):
            message = await self.channel.receive()
        assert message is not None
        return message

    async def say(self, *message: object) -> None:
        self.channel.post(*message)
        assert await self.channel.flush()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[SharedRegistry, OtherEnd]]:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        channel = Channel(left)
        registry = SharedRegistry(channel)

        async def listen() -> None:
            while (message := await channel.receive()) is not None:
                registry.take(message)
            registry.lost()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.write)
            nursery.start_soon(listen)
            yield registry, OtherEnd(Channel(right))
            nursery.cancel_scope.cancel()


async def test_it_opens_with_what_the_store_knows_and_tells_what_all_know() -> None:
    async with connected() as (registry, end), trio.open_nursery() as nursery:

        async def answer() -> None:
            assert await end.hear() == ("known", (("trade", "g", (tuple(to_wire(ONE)),)),))
            assert await end.hear() == ("open",)
            await end.say("nodes", [("trade", "g", [to_wire(ONE), to_wire(TWO)]), ("trade", "gone", [])])
            await end.say("opened")

        nursery.start_soon(answer)
        assert registry.state.degraded
        async with registry.open({KEY: [ONE]}) as opened:
            assert not opened.state.degraded
            snapshot = await opened.wait_changed()
            assert snapshot.bindings == {KEY: (ONE, TWO), ("trade", "gone"): ()}
            await end.say("nodes", [("trade", "gone", None)])
            assert (await opened.wait_changed()).bindings == {KEY: (ONE, TWO)}


async def test_a_node_is_unknown_while_a_change_of_it_is_not_answered() -> None:
    async with connected() as (registry, end), trio.open_nursery() as nursery:
        nursery.start_soon(registry.merge_bindings, "g", "trade", [ONE])
        _, request, *rest = await end.hear()
        assert rest == ["trade", "g", (tuple(to_wire(ONE)),)]
        await end.say("nodes", [("trade", "g", []), ("trade", "other", [to_wire(TWO)])])
        assert (await registry.wait_changed()).bindings == {KEY: None, ("trade", "other"): (TWO,)}
        await end.say("nodes", [("trade", "g", [to_wire(ONE)])])
        await end.say("done", request, None, None)
        with trio.fail_after(10):
            while (await registry.wait_changed()).bindings[KEY] is None:
                pass


async def test_the_same_answer_to_a_change_is_told_though_no_node_has_changed() -> None:
    async with connected() as (registry, end), trio.open_nursery() as nursery:
        await end.say("nodes", [("trade", "g", [to_wire(ONE)])])
        await registry.wait_changed()
        nursery.start_soon(registry.merge_bindings, "g", "trade", [ONE])
        _, request, *_ = await end.hear()
        await end.say("nodes", [])
        assert (await registry.wait_changed()).bindings == {KEY: None}
        await end.say("done", request, None, None)
        with trio.fail_after(10):
            assert (await registry.wait_changed()).bindings == {KEY: (ONE,)}


async def test_a_contradiction_is_refused() -> None:
    async with connected() as (registry, end), trio.open_nursery() as nursery:

        async def answer() -> None:
            _, request, *_ = await end.hear()
            await end.say("done", request, "binding_conflict", "no")

        nursery.start_soon(answer)
        with pytest.raises(Refused) as caught:
            await registry.merge_bindings("g", "trade", [ONE])
        assert (caught.value.code, caught.value.reason) == ("binding_conflict", "no")


async def test_without_an_answer_it_is_unavailable_and_the_request_stays() -> None:
    async with connected() as (registry, end):
        with pytest.raises(RegistryUnavailable, match=r"not answered within 0\.01 s"):
            await registry.remove_binding("g", "trade", [ONE], timeout=0.01)
        verb, request, *_ = await end.hear()
        assert verb == "remove"
        await end.say("nodes", [("trade", "g", [])])
        assert (await registry.wait_changed()).bindings == {KEY: None}
        await end.say("done", request, None, None)
        with trio.fail_after(10):
            assert (await registry.wait_changed()).bindings == {KEY: ()}


async def test_too_many_requests_without_an_answer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WAITING_MAX", 1)
    async with connected() as (registry, end):
        await end.say("opened")
        await registry.wait_changed()
        with pytest.raises(RegistryUnavailable, match="within"):
            await registry.merge_bindings("g", "trade", [ONE], timeout=0.01)
        with pytest.raises(RegistryUnavailable, match="does not answer"):
            await registry.merge_bindings("g", "trade", [ONE])


async def test_it_is_degraded_when_the_other_end_is_gone() -> None:
    async with connected() as (registry, end):
        await end.say("opened")
        await registry.wait_changed()
        assert not registry.state.degraded
        end.channel.close()
        with trio.fail_after(10):
            while not registry.state.session_over:
                await trio.lowlevel.checkpoint()
        assert "has ended" in registry.state.reason
        with pytest.raises(RegistryUnavailable, match="has ended"):
            await registry.merge_bindings("g", "trade", [ONE])
