"""Lets a connection speak only after a greeting that this broker accepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kiteq.binding.bindings import Binding, from_wire
from kiteq.errors import Refused
from kiteq.limits import FRAME_OVERHEAD_BYTES, HEARTBEAT_SECONDS, IDLE_SECONDS_MAX
from kiteq.message import check_name
from kiteq.pipe.events import PacketsRead, Trusted
from kiteq.pipe.neighbours import tell_neighbours
from kiteq.pipe.registration import bind_shared
from kiteq.remoting.packets import PROTOCOL, WIRE_VERSIONS, Hello, Refusal, Welcome, agreed_version

if TYPE_CHECKING:
    from kiteq.errors import StoreError
    from kiteq.pipe.core import Core
    from kiteq.pipe.peer import Peer

__all__ = ["Authenticate", "parse_bindings"]

OF_PATTERNS = ("a regex pattern", "the pattern")
"""How the errors of `Binding` begin that are about its pattern."""


class Authenticate:
    """The first packet must be a Hello; anything else ends the connection."""

    accepts = (PacketsRead,)
    emits = (Trusted,)

    def __init__(self, core: Core) -> None:
        self._core = core

    def handle(self, event: PacketsRead) -> tuple[Trusted, ...]:
        """Pass on the packets of a connection that was greeted."""
        peer = event.peer
        if peer.accepted:
            return (Trusted(peer, event.packets),)
        first = event.packets[0]
        if type(first) is not Hello:
            peer.refuse("not_authenticated", "the first packet of a connection must be a Hello")
        elif peer.group or len(event.packets) > 1:
            peer.refuse("not_authenticated", "nothing may be sent between a Hello and its answer")
        else:
            self._greet(peer, first)
        return ()

    def _greet(self, peer: Peer, hello: Hello) -> None:
        try:
            bindings = self._check(hello)
        except Refused as refused:
            peer.send(Refusal(hello.request, refused.code, refused.reason, refused.temporary))
            peer.close(f"{refused.code}: {refused.reason}")
            return
        peer.group = hello.group
        peer.instance = hello.instance
        peer.topics = frozenset(hello.topics)
        peer.name = f"{peer.name}/{hello.instance.hex()[:8]}"
        peer.warm_up = hello.warm_up
        peer.concurrency = max(1, hello.concurrency)

        def bound(error: StoreError | Refused | None) -> None:
            if error is not None:
                refused = error if isinstance(error, Refused) else Refused("store_full", str(error), temporary=True)
                peer.send(Refusal(hello.request, refused.code, refused.reason, refused.temporary))
                peer.close(refused.reason)
            elif peer.close_reason is None and peer in self._core.peers:
                self._welcome(peer, hello)

        bind_shared(self._core, peer.group, bindings, bound)

    def _check(self, hello: Hello) -> list[Binding]:
        core = self._core
        if hello.protocol != PROTOCOL:
            raise Refused("protocol_version", f"this is a kiteq broker, not one for {hello.protocol!r}"[:200])
        if agreed_version(WIRE_VERSIONS, hello.versions) is None:
            older = max(hello.versions, default=0) < WIRE_VERSIONS[-1]
            raise Refused(
                "protocol_version",
                f"this broker speaks wire versions {_versions(WIRE_VERSIONS)}, the client "
                f"{_versions(hello.versions[:9])}: upgrade the {'client' if older else 'broker'}",
            )
        if core.draining:
            raise Refused("draining", "this broker is shutting down", temporary=True)
        try:
            check_name("group", hello.group)
            for topic in hello.topics:
                check_name("topic", topic)
        except ValueError as error:
            raise Refused("bad_name", str(error)) from error
        for topic in hello.topics:
            core.router.check_served(topic)
        return parse_bindings(hello.bindings)

    def _welcome(self, peer: Peer, hello: Hello) -> None:
        core = self._core
        version = agreed_version(WIRE_VERSIONS, hello.versions)
        assert version is not None
        peer.version = version
        peer.accepted = True
        core.counters["greeted"] += 1
        core.checks.joined(peer)
        if core.deliveries.join(peer):
            core.router.forget_routes()
        limits = {
            "frame_bytes": core.settings.message_limit + FRAME_OVERHEAD_BYTES,
            "body_bytes": core.settings.message_limit,
            "heartbeat_ms": int(HEARTBEAT_SECONDS * 1000),
            "idle_ms": int(IDLE_SECONDS_MAX * 1000),
            "ack_deadline_ms": int(core.settings.ack_deadline * 1000),
        }
        peer.send(Welcome(hello.request, version, core.store.broker_id, limits, peer.local))
        tell_neighbours(core, peer)


def _versions(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "none"


def parse_bindings(wire: list[list[object]]) -> list[Binding]:
    """Return the bindings of a packet. Raises `Refused`."""
    bindings: list[Binding] = []
    for item in wire:
        try:
            bindings.append(from_wire(item))
        except ValueError as error:
            raise Refused("bad_pattern" if str(error).startswith(OF_PATTERNS) else "bad_name", str(error)) from error
    return bindings
