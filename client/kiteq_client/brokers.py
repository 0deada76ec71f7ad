"""The brokers of a client: which are connected, and how each is greeted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio

from kiteq.binding.bindings import Binding, to_wire
from kiteq.errors import NotConnected, Refused
from kiteq.remoting.packets import PROTOCOL, WIRE_VERSIONS, Hello, Subscribe, Unsubscribe
from kiteq_client.broker import Broker
from kiteq_client.session import Session
from kiteq_client.signal import Signal

__all__ = ["Brokers", "Greeting"]

OTHERS_SECONDS: Final = 0.5
"""Once one broker has accepted, how long entering waits to hear of the others."""


class Greeting:
    """What a client says about itself at every connection; its bindings may change meanwhile."""

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
        self._instance = instance
        self._group = group
        self._topics = list(topics)
        self._warm_up = warm_up
        self._concurrency = concurrency

    def hello(self, request: int) -> Hello:
        """Return the packet."""
        bindings = [to_wire(binding) for binding in self.bindings]
        return Hello(
            request, PROTOCOL, list(WIRE_VERSIONS), self._instance, self._group, self._topics, bindings,
            self._warm_up, self._concurrency,
        )  # fmt: skip

    def forget(self, binding: Binding) -> None:
        """Do not bring a binding any more."""
        self.bindings = [known for known in self.bindings if _key(known) != _key(binding)]


class Brokers:
    """All brokers of a registry.

    `all` is filled once, by who makes the client. `progress` is set when a connection was made or failed.
    """

    def __init__(self, greeting: Greeting) -> None:
        self.all: list[Broker] = []
        self.progress = Signal()
        self._greeting = greeting

    def sessions(self) -> list[Session]:
        """Return the connections of the moment."""
        return [broker.session for broker in self.all if broker.session is not None]

    def connected_sessions(self) -> list[Session]:
        """Return the connections of the moment. Raises `not_connected` if there is none."""
        sessions = self.sessions()
        if not sessions:
            raise self.not_connected()
        return sessions

    def not_connected(self) -> Exception:
        """Return why there is no connection: a refusal, if a broker gave one."""
        for broker in self.all:
            if isinstance(broker.error, Refused):
                return broker.error
        return NotConnected("; ".join(str(broker.error) for broker in self.all))

    async def wait_connected(self, timeout: float, has_failed: Callable[[], bool]) -> None:
        """Return when a broker has accepted, all have refused for good, the client has failed, or time is over."""
        with anyio.move_on_after(timeout):
            while not self.sessions() and not has_failed() and not all(map(_is_final, self.all)):
                await self.progress.wait()

    async def wait_others(self) -> None:
        """Give each broker some time for its first attempt."""
        with anyio.move_on_after(OTHERS_SECONDS):
            for broker in self.all:
                await broker.tried.wait()

    def wake_writers(self) -> None:
        """There may be something to send."""
        # The first one woken takes most of what waits, so they take turns.
        self.all.append(self.all.pop(0))
        for session in self.sessions():
            session.wake()

    async def subscribe(self, binding: Binding) -> None:
        """Add a binding at every broker that is connected, and bring it to the others later."""
        for session in self.connected_sessions():
            await session.ask(lambda request: Subscribe(request, [to_wire(binding)]))
        self._greeting.forget(binding)
        self._greeting.bindings.append(binding)

    async def unsubscribe(self, binding: Binding) -> None:
        """Remove a binding at every broker that is connected, and bring it to none any more."""
        for session in self.connected_sessions():
            await session.ask(lambda request: Unsubscribe(request, binding.topic, int(binding.kind), binding.pattern))
        self._greeting.forget(binding)


def _is_final(broker: Broker) -> bool:
    return broker.tried.is_set() and isinstance(broker.error, Refused) and not broker.error.temporary


def _key(binding: Binding) -> tuple[Any, ...]:
    return binding.topic, binding.kind, binding.pattern
