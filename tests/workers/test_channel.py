"""Messages between the process that runs the workers and one of them."""

from __future__ import annotations

import socket

import trio
import trio.testing

from kiteq.workers.channel import Channel


async def test_what_is_cut_short_is_followed_by_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        channel = Channel(left)
        channel.post("known", "x" * (16 << 20))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.flush)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        channel.post("failed", "a sentence", 1)
        with trio.fail_after(5):
            assert not await channel.flush()


async def test_changes_go_ahead_of_what_was_posted_and_the_end_is_no_error() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        channel = Channel(left, lambda: [("nodes", 1)])
        channel.post("done", 2)
        assert await channel.flush()
        other = Channel(right)
        assert [await other.receive(), await other.receive()] == [("nodes", 1), ("done", 2)]
        channel.close()
        assert await other.receive() is None
        other.post("ready")
        assert not await other.flush()
