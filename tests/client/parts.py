"""What many of these tests send, raise and answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from anyio.lowlevel import checkpoint

from kiteq.remoting.packets import Decide, Packet
from kiteq_client import Decision, Message, Received

__all__ = ["OwnError", "answering", "is_decide", "message"]


class OwnError(Exception):
    """An error of the application."""


def message(body: bytes = b"x", topic: str = "trade") -> Message:
    return Message(topic, "pay", body)


def is_decide(packet: Packet) -> bool:
    return isinstance(packet, Decide)


def answering(*answers: Decision) -> Callable[[Received], Awaitable[Decision]]:
    """Return a check function that answers this, one after the other."""
    left = list(answers)

    async def check(_received: Received) -> Decision:
        await checkpoint()
        return left.pop(0)

    return check
