"""Bindings that change while some brokers are being greeted, stand still or are lost."""

from __future__ import annotations

import anyio
import pytest

from kiteq.registry.layout import Server
from kiteq.remoting.packets import Goodbye, Hello, Packet, Refusal, Subscribe, Subscribed, Unsubscribe, Welcome
from kiteq_client import Client, Refused, SendTimeout, direct, fanout
from tests.client.announcing import announce, finding_client
from tests.client.ledger import until, warnings
from tests.client.peer import LIMITS, Connection, both_loops, peer

BINDING = direct("trade", "pay")


class Binder:
    """A broker that is told of bindings. how: it does "well", stands "still", is "lost" then, or does "refuse"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.how = "well"
        self.bound: set[object] = set()
        self.hellos: list[Hello] = []
        self.seen: list[Packet] = []
        self.may_welcome = anyio.Event()

    async def script(self, connection: Connection) -> None:
        hello = await connection.expect(Hello)
        self.hellos.append(hello)
        self.bound.update(tuple(binding[:3]) for binding in hello.bindings)
        await self.may_welcome.wait()
        await connection.send(Welcome(hello.request, 1, self.name, LIMITS, admin=True))
        while not isinstance(packet := await connection.receive(), Goodbye):
            if isinstance(packet, Subscribe | Unsubscribe):
                self.seen.append(packet)
                if isinstance(packet, Subscribe):
                    self.bound.update(tuple(binding[:3]) for binding in packet.bindings)
                else:
                    self.bound.discard(packet[1:])
                if self.how == "lost":
                    return
                if self.how == "refuse":
                    await connection.send(Refusal(packet.request, "binding_conflict", "no", temporary=False))
                elif self.how == "well":
                    await connection.send(Subscribed(packet.request))


def binders() -> tuple[Binder, Binder]:
    one, two = Binder("b1"), Binder("b2")
    one.may_welcome.set()
    two.may_welcome.set()
    return one, two


@both_loops
async def test_a_binding_removed_while_a_broker_greets_is_removed_there_too() -> None:
    one, two = Binder("b1"), Binder("b2")
    one.may_welcome.set()
    async with (
        peer(one.script) as first,
        peer(two.script) as second,
        Client(f"kiteq://{first},{second}", group="g", bindings=[BINDING]) as client,
    ):
        await until(lambda: two.bound)
        await client.unsubscribe(BINDING)
        two.may_welcome.set()
        await until(lambda: not two.bound)
        assert not one.bound
        assert [type(packet) for packet in one.seen] == [Unsubscribe]


@both_loops
async def test_a_binding_is_brought_to_a_broker_that_announces_its_topic_while_it_greets() -> None:
    broker = Binder("b1")
    with finding_client(bindings=[BINDING, fanout("feed")]) as client:
        async with peer(broker.script) as address, client:
            announce(client, (address, Server("b1", 1, 1), ("trade",)))
            await until(lambda: broker.hellos)
            announce(client, (address, Server("b1", 1, 1), ("trade", "feed")))
            broker.may_welcome.set()
            await until(lambda: broker.bound == {("trade", 0, "pay"), ("feed", 2, "*")})


@both_loops
async def test_a_binding_is_added_at_the_others_while_one_stands_still() -> None:
    still, other = binders()
    still.how = "still"
    async with (
        peer(still.script) as first,
        peer(other.script) as second,
        Client(f"kiteq://{first},{second}", group="g", timeout=0.3) as client,
    ):
        await until(lambda: len(client._brokers.sessions()) == 2)
        with warnings() as texts:
            await client.subscribe(BINDING)
        assert other.bound == {("trade", 0, "pay")}
        assert any("b1 did not confirm" in text for text in texts)
        await until(lambda: len(still.seen) == 2)  # told again
        with pytest.raises(SendTimeout, match="b1"):
            await client.unsubscribe(BINDING)
        assert not other.bound


@both_loops
async def test_a_binding_that_is_changed_and_changed_back_is_told_again_to_who_did_not_confirm() -> None:
    still, other = binders()
    async with (
        peer(still.script) as first,
        peer(other.script) as second,
        Client(f"kiteq://{first},{second}", group="g", timeout=0.3) as client,
    ):
        await until(lambda: len(client._brokers.sessions()) == 2)
        for watermark in (10, 20):
            await client.subscribe(direct("trade", "pay", watermark=watermark))
        still.how = "still"
        await client.subscribe(direct("trade", "pay", watermark=10))
        await until(lambda: len(still.seen) == 4)


@both_loops
async def test_a_binding_is_brought_to_a_broker_that_was_lost_while_it_was_told() -> None:
    lost, other = binders()
    lost.how = "lost"
    async with (
        peer(lost.script) as first,
        peer(other.script) as second,
        Client(f"kiteq://{first},{second}", group="g") as client,
    ):
        await until(lambda: len(client._brokers.sessions()) == 2)
        await client.subscribe(BINDING)
        await until(lambda: len(lost.hellos) == 2)
        assert [binding[:3] for binding in lost.hellos[1].bindings] == [["trade", 0, "pay"]]


@both_loops
async def test_a_binding_that_one_broker_refuses_is_an_error_and_is_not_brought_again() -> None:
    one, two = binders()
    two.how = "refuse"
    async with (
        peer(one.script) as first,
        peer(two.script) as second,
        Client(f"kiteq://{first},{second}", group="g") as client,
    ):
        await until(lambda: len(client._brokers.sessions()) == 2)
        with pytest.raises(Refused, match="no"):
            await client.subscribe(BINDING)
        one.how = two.how = "well"
        await client.subscribe(fanout("feed"))
        assert [len(binder.seen) for binder in (one, two)] == [2, 2]
