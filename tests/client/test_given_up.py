"""Sends that nobody waits for any more: they hold up nothing, and are not repeated."""

from __future__ import annotations

import anyio
from anyio.abc import SocketAttribute

from kiteq.remoting.packets import Brokers, Goodbye, Packet, Publish
from kiteq_client import Client
from tests.client.ledger import Ledger, until
from tests.client.parts import message
from tests.client.peer import Connection, both_loops, peer


def is_publish(packet: Packet) -> bool:
    return isinstance(packet, Publish)


async def read_until_goodbye(connection: Connection) -> None:
    while not isinstance(await connection.receive(), Goodbye):
        pass


async def send_and_give_up(client: Client, count: int) -> None:
    with anyio.move_on_after(0.1):
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(client.send, message())


@both_loops
async def test_cancelled_sends_leave_their_room_to_others() -> None:
    ledger = Ledger()
    ledger.lose = is_publish
    async with peer(ledger.script) as one, Client(f"kiteq://{one}", group="g", max_in_flight=2) as client:
        await send_and_give_up(client, 2)
        assert sum(len(packet.messages) for packet in ledger.packets(Publish)) == 2
        ledger.lose = lambda _packet: False
        await client.send(message())


@both_loops
async def test_a_broker_that_is_gone_for_ever_takes_no_room_with_it() -> None:
    gone, left_the_set = anyio.Event(), anyio.Event()

    async def second(connection: Connection) -> None:
        await connection.accept(broker="b2", version=2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read_until_goodbye, connection)
            await gone.wait()
            tasks.cancel_scope.cancel()

    async with peer(second) as two:

        async def first(connection: Connection) -> None:
            await connection.accept(broker="b1", version=2)
            await connection.send(Brokers(0, [two]))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read_until_goodbye, connection)
                await left_the_set.wait()
                await connection.send(Brokers(0, [f":{connection.stream.extra(SocketAttribute.local_port)}"]))

        async with peer(first) as one, Client(f"kiteq://{one}", group="g") as client:
            brokers, outgoing = client._brokers, client._producer.outgoing
            await until(lambda: len(brokers.sessions()) == 2)
            await send_and_give_up(client, 20)
            left_the_set.set()
            await until(lambda: not all(dialler.listed for dialler in brokers.diallers.values()))
            gone.set()
            await until(lambda: len(brokers.all) == 1)
            await until(lambda: outgoing.in_flight == 0)


@both_loops
async def test_what_nobody_waits_for_is_not_sent_again() -> None:
    ledger = Ledger()
    ledger.lose = is_publish
    async with peer(ledger.script) as one, Client(f"kiteq://{one}", group="g") as client:
        await send_and_give_up(client, 3)
        sent = len(ledger.packets(Publish))
        await ledger.connections[0].stream.aclose()
        await until(lambda: client.statistics().reconnects)
        ledger.lose = lambda _packet: False
        await client.send(message())
        assert len(ledger.packets(Publish)) == sent + 1
