"""Brokers that drain: what they refuse goes elsewhere or waits, what they delivered is finished or given back."""

from __future__ import annotations

import anyio
import pytest

from kiteq.message import decode
from kiteq.remoting.packets import (
    NACK_UNSTARTED,
    Ack,
    Credit,
    Enlist,
    Goodbye,
    Hello,
    Nack,
    Packet,
    Prepare,
    Publish,
    Refusal,
    Settled,
)
from kiteq_client import Client, NotConnected, Receipt, Received
from tests.client.ledger import Ledger, until, warnings
from tests.client.parts import message
from tests.client.peer import Connection, both_loops, peer, well


def is_publish(packet: Packet) -> bool:
    return isinstance(packet, Publish)


def bodies(ledger: Ledger) -> list[bytes]:
    return [decode(blob, "g", 1).body for packet in ledger.packets(Publish) for blob in packet.messages]


async def serve_draining(connection: Connection, kind: type[Publish | Prepare | Enlist]) -> None:
    """Refuse one packet as a broker does that shuts down, and say goodbye."""
    packet = await connection.expect(kind)
    await connection.send(Refusal(packet.request, "draining", "shutting down", temporary=True))
    await connection.send(Goodbye(0, "shutting down"))
    with anyio.fail_after(4):
        while not isinstance(await connection.receive(), Goodbye):
            pass


@both_loops
async def test_what_a_broker_refuses_because_it_shuts_down_goes_to_another_in_order() -> None:
    other = Ledger("b2")
    ready, both = anyio.Event(), anyio.Event()

    async def leaving(connection: Connection) -> None:
        await connection.accept(broker="b1")
        frames = [await connection.expect(Publish) for _ in range(2)]
        ready.set()
        await both.wait()
        refusals = [Refusal(frame.request, "draining", "shutting down", temporary=True) for frame in frames]
        await connection.send(*refusals, Goodbye(0, "shutting down"))
        await connection.expect(Goodbye)

    async def refusing(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await connection.send(Refusal(hello.request, "draining", "shutting down", temporary=True))

    async def late(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await ready.wait()
        connection._packets.append(hello)
        await other.script(connection)

    async with peer(leaving, refusing) as one, peer(late) as two:
        with warnings() as warned:
            async with Client(f"kiteq://{one},{two}", group="g", max_in_flight=400, wait=False) as client:
                receipts: list[Receipt] = []

                async def send() -> None:
                    receipts.extend(await client.send_many(message(b"%03d" % number) for number in range(600)))

                async with anyio.create_task_group() as tasks:
                    await until(lambda: client.statistics().connected)
                    tasks.start_soon(send)
                    await until(lambda: len(client.statistics().connected) == 2)
                    both.set()
                assert {receipt.broker for receipt in receipts} == {"b2"}
        assert warned == []
    assert bodies(other) == [b"%03d" % number for number in range(600)]


@both_loops
async def test_the_only_broker_may_shut_down_and_come_back_within_the_timeout() -> None:
    async def leaving(connection: Connection) -> None:
        await connection.accept()
        await serve_draining(connection, Publish)

    ledger = Ledger("b1")
    async with peer(leaving, ledger.script) as address, Client(address, group="g") as client:
        with warnings() as warned:
            assert (await client.send(message())).broker == "b1"
        assert warned == []
    assert len(bodies(ledger)) == 1


@both_loops
async def test_what_no_broker_takes_in_time_was_not_sent() -> None:
    async def leaving(connection: Connection) -> None:
        await connection.accept()
        await serve_draining(connection, Publish)

    async def refusing(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await connection.send(Refusal(hello.request, "draining", "shutting down", temporary=True))

    async with peer(leaving, refusing) as address, Client(address, group="g", timeout=0.3) as client:
        with pytest.raises(NotConnected, match="shutting down"):
            await client.send(message())


@both_loops
async def test_what_the_only_broker_does_not_take_while_it_finishes_was_not_sent() -> None:
    started, may_end = anyio.Event(), anyio.Event()

    async def leaving(connection: Connection) -> None:
        await connection.accept()
        await connection.expect(Credit)
        await connection.deliver(message())
        await started.wait()
        await connection.send(Goodbye(0, "shutting down"))
        await connection.serve()

    async def handle(_message: Received) -> None:
        started.set()
        await may_end.wait()

    async with peer(leaving) as address, Client(address, group="g", on_message=handle, timeout=0.3) as client:
        await until(lambda: not client._brokers.all[0].takes_messages)
        for block in (client.send(message()), client.prepare(message())):
            with pytest.raises(NotConnected, match="broker b1 is shutting down"):
                await block
        may_end.set()


@both_loops
async def test_what_a_broker_may_have_goes_to_no_other_though_it_shuts_down() -> None:
    back, other = Ledger("b1"), Ledger("b2")
    sent: list[Publish] = []

    async def drop(connection: Connection) -> None:
        await connection.accept(broker="b1")
        sent.append(await connection.expect(Publish))

    async def leaving(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await serve_draining(connection, Publish)

    other.lose = is_publish
    async with (
        peer(drop, leaving, back.script) as one,
        peer(other.script) as two,
        Client(f"kiteq://{one},{two}", group="g", timeout=2) as client,
        anyio.create_task_group() as tasks,
    ):
        # Two are under way, so each broker has one.
        tasks.start_soon(client.send, message())
        tasks.start_soon(client.send, message())
        await until(lambda: bodies(back))
        tasks.cancel_scope.cancel()
    assert back.packets(Publish)[0].messages == sent[0].messages
    assert len(bodies(other)) == 1


@both_loops
async def test_a_half_message_that_is_refused_by_a_shutdown_goes_to_another_and_an_addition_waits() -> None:
    ledgers = [Ledger("b1"), Ledger("b2")]

    async def begin(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await serve_draining(connection, Prepare)

    async def add(connection: Connection) -> None:
        await connection.accept(broker="b2")
        prepare = await connection.expect(Prepare)
        await connection.send(ledgers[1].answered(prepare))
        await serve_draining(connection, Enlist)

    async with (
        peer(begin, ledgers[0].script) as one,
        peer(add, ledgers[1].script) as two,
        Client(f"kiteq://{one},{two}", group="g", topics=["trade"]) as client,
    ):
        with warnings() as warned:
            async with client.transaction(message()) as tx:
                await tx.add(message())
        assert warned == []
    assert ledgers[1].committed == {tx.id}
    assert not ledgers[0].seen or not ledgers[0].packets(Prepare)


@both_loops
async def test_a_broker_that_drains_gets_back_what_is_not_begun_and_waits_for_the_rest() -> None:
    seen: list[Packet] = []
    started, may_end = anyio.Event(), anyio.Event()

    async def script(connection: Connection) -> None:
        await connection.accept()
        await connection.expect(Credit)
        await connection.deliver(message(), message(), message())
        await started.wait()
        await connection.send(Goodbye(0, "the broker is shutting down"))
        nack = await connection.expect(Nack)
        may_end.set()
        await connection.send(Settled(nack.request, []))
        seen.append(nack)
        await connection.serve(seen)

    async def handle(received: Received) -> None:
        started.set()
        await may_end.wait()

    async with peer(script, well) as address, Client(address, group="g", on_message=handle) as client:
        await until(lambda: client.statistics().reconnects)
    given_back = [item[:2] for packet in seen if isinstance(packet, Nack) for item in packet.items]
    assert given_back == [[tag, NACK_UNSTARTED] for tag in (2, 3)]
    assert [packet.ranges for packet in seen if isinstance(packet, Ack)] == [[1, 1]]
