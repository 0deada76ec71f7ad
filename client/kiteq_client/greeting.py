"""The greeting of a connection: what a client says about itself, and what the broker answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from anyio.abc import ByteStream

from kiteq.binding.bindings import Binding, Kind, to_wire
from kiteq.errors import RemoteProtocolError, refusal
from kiteq.limits import READ_BYTES
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import (
    PROTOCOL,
    WIRE_VERSIONS,
    Hello,
    Packet,
    Refusal,
    Subscribe,
    Unsubscribe,
    Welcome,
)

__all__ = ["Greeting", "Key", "greet", "key_of", "subscribing", "unsubscribing"]

Key = tuple[str, Kind, str]
"""What tells one binding of a group from another: topic, kind and pattern."""
HELLO_REQUEST: Final = 1
"""The number of the first request; its answer is known by its place."""


class Greeting:
    """What a client says about itself at every connection; its topics and bindings may change meanwhile."""

    def __init__(
        self,
        instance: bytes,
        group: str,
        topics: Sequence[str],
        bindings: Sequence[Binding],
        *,
        warm_up: int,
        concurrency: int,
    ) -> None:
        self.bindings = list(bindings)
        self.topics = list(topics)
        self._instance = instance
        self._group = group
        self._warm_up = warm_up
        self._concurrency = concurrency

    def hello(self, serves: Callable[[str], bool]) -> Hello:
        """Return the packet for a broker, with those topics and bindings that it serves."""
        bindings = [to_wire(binding) for binding in self.bindings if serves(binding.topic)]
        return Hello(
            HELLO_REQUEST, PROTOCOL, list(WIRE_VERSIONS), self._instance, self._group,
            [topic for topic in self.topics if serves(topic)], bindings, self._warm_up, self._concurrency,
        )  # fmt: skip

    def remember(self, binding: Binding) -> None:
        """Bring a binding from now on, instead of one of the same kind and pattern."""
        self.forget(binding)
        self.bindings.append(binding)

    def forget(self, binding: Binding) -> None:
        """Do not bring a binding any more."""
        self.bindings = [known for known in self.bindings if key_of(known) != key_of(binding)]


def key_of(binding: Binding) -> Key:
    """Return what tells one binding of a group from another."""
    return binding.topic, binding.kind, binding.pattern


def subscribing(binding: Binding) -> Callable[[int], Subscribe]:
    """Return what makes the request that adds a binding."""
    return lambda request: Subscribe(request, [to_wire(binding)])


def unsubscribing(binding: Binding) -> Callable[[int], Unsubscribe]:
    """Return what makes the request that removes a binding."""
    return lambda request: Unsubscribe(request, binding.topic, int(binding.kind), binding.pattern)


async def greet(stream: ByteStream, decoder: Decoder, hello: Hello) -> tuple[Welcome, list[Packet]]:
    """Introduce the client; return the answer, and what came with it, once the bindings are durable.

    Raises the broker's refusal, `ProtocolError`, or an error of the connection.
    """
    await stream.send(encode_packet(hello))
    packets: list[Packet] = []
    while not packets:
        packets = decoder.feed(await stream.receive(READ_BYTES))
    first = packets[0]
    if type(first) is Refusal:
        raise refusal(first.code, first.reason, first.temporary)
    if type(first) is not Welcome:
        raise RemoteProtocolError(f"the broker answered the greeting with {type(first).__name__}"[:200])
    if first.version not in WIRE_VERSIONS:
        raise RemoteProtocolError(f"the broker chose wire version {first.version}, which was not offered")
    return first, packets[1:]
