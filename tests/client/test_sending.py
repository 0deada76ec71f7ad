"""Sending, against a broker that answers late, badly or not at all."""

from __future__ import annotations

import socket
from typing import Any

import anyio
import pytest

from kiteq.remoting.packets import Goodbye, Hello, Packet, Publish, Receipts, Refusal
from kiteq_client import (
    AuthenticationError,
    Client,
    ClientClosed,
    MessageTooLarge,
    NotConnected,
    PartlySent,
    Receipt,
    Refused,
    SendTimeout,
    direct,
)
from tests.client.parts import message
from tests.client.peer import Connection, both_loops, peer, well


@both_loops
async def test_the_greeting_names_group_topics_and_bindings() -> None:
    greetings: list[Hello] = []

    async def script(connection: Connection) -> None:
        await connection.accept()
        assert connection.hello is not None
        greetings.append(connection.hello)
        await connection.serve()

    async with (
        peer(script) as address,
        Client(f"kiteq://{address}", group="g", topics=["trade"], bindings=[direct("trade", "pay", watermark=5)]),
    ):
        pass
    [hello] = greetings
    assert (hello.group, hello.topics, hello.versions) == ("g", ["trade"], [1, 2])
    assert hello.bindings == [["trade", 0, "pay", 5, True, "latest"]]
    assert len(hello.instance) == 16


@both_loops
async def test_a_receipt_is_returned() -> None:
    async with peer(well) as address, Client(address, group="g") as client:
        sent = message()
        assert await client.send(sent) == Receipt(sent.id, "b1", 1, duplicate=False, durable=True)


@pytest.mark.parametrize(
    ("code", "error"), [("authentication_failed", AuthenticationError), ("topic_not_served", Refused)]
)
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_refused_greeting_is_raised_at_once(loop: str, code: str, error: type[Exception]) -> None:
    async def script(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await connection.send(Refusal(hello.request, code, "not so", temporary=False))

    async def enter() -> None:
        async with peer(script) as address:
            with anyio.fail_after(2), pytest.raises(error, match="not so"):
                async with Client(address, group="g", timeout=60):
                    raise AssertionError

    anyio.run(enter, backend=loop)


@both_loops
async def test_why_no_address_of_a_host_was_reached_is_told() -> None:
    def both(_host: object, port: int, *_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", port)) for last in (1, 2)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", both)
        with pytest.raises(NotConnected, match=r"Errno \d+.*Errno \d+"):
            async with Client("broker.example:1", group="g", timeout=1):
                raise AssertionError


@both_loops
async def test_without_a_broker_entering_and_sending_fail_within_the_timeout() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    await listener.aclose()
    with pytest.raises(NotConnected, match="could not be reached"):
        async with Client(f"127.0.0.1:{port}", group="g", timeout=0.1):
            raise AssertionError
    async with Client(f"127.0.0.1:{port}", group="g", timeout=0.1, wait=False) as client:
        with pytest.raises(NotConnected):
            await client.send(message())
        assert list(client.statistics().not_reached) == [f"127.0.0.1:{port}"]


@both_loops
async def test_one_of_two_brokers_is_enough() -> None:
    async with (
        peer(well) as address,
        Client(f"kiteq://{address},127.0.0.1:1", group="g") as client,
    ):
        assert client.statistics().connected == (address,)
        assert "127.0.0.1:1" in client.statistics().not_reached
        assert (await client.send(message())).broker == "b1"


@both_loops
async def test_withheld_answers_become_send_timeout() -> None:
    async def script(connection: Connection) -> None:
        await connection.accept()
        await connection.expect(Publish)
        await connection.expect(Goodbye)

    async with peer(script) as address, Client(address, group="g", timeout=0.1) as client:
        with pytest.raises(SendTimeout, match="unknown"):
            await client.send(message())


@both_loops
async def test_what_was_not_answered_is_sent_again_byte_for_byte_after_a_reconnect() -> None:
    first: list[Publish] = []

    async def drop(connection: Connection) -> None:
        await connection.accept()
        first.append(await connection.expect(Publish))

    async def answer(connection: Connection) -> None:
        await connection.accept()
        again = await connection.expect(Publish)
        assert again.messages == first[0].messages
        exceptions = [[0, "duplicate", "", False]]
        await connection.send(Receipts(again.request, 1, True, exceptions))
        await connection.serve()

    async with peer(drop, answer) as address, Client(address, group="g") as client:
        receipts = await client.send_many([message(), message()])
        assert [receipt.duplicate for receipt in receipts] == [True, False]
        assert [receipt.groups for receipt in receipts] == [None, 1]
        assert client.statistics().reconnects == 1


@both_loops
async def test_another_broker_at_the_address_gets_nothing_again() -> None:
    async def drop(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await connection.expect(Publish)

    async def other(connection: Connection) -> None:
        await connection.accept(broker="b2")
        await connection.serve()

    async with peer(drop, other) as address, Client(address, group="g") as client:
        with pytest.raises(SendTimeout, match="b2"):
            await client.send(message())
        assert (await client.send(message())).broker == "b2"


@both_loops
async def test_refusals_belong_to_their_messages() -> None:
    async def script(connection: Connection) -> None:
        await connection.accept(body_bytes=1_000)
        publish = await connection.expect(Publish)
        assert len(publish.messages) == 3
        await connection.send(Receipts(publish.request, [0, 1, 2], True, [[1, "store_full", "no room", True]]))
        await connection.serve()

    async with peer(script) as address, Client(address, group="g") as client:
        with pytest.raises(PartlySent) as caught:
            await client.send_many([message(), message(), message(b"x" * 1_001), message()])
        one, two, three, four = caught.value.results
        assert (one.groups, four.groups) == (0, 2)
        assert isinstance(two, Refused)
        assert (two.code, two.temporary) == ("store_full", True)
        assert isinstance(three, MessageTooLarge)


@both_loops
async def test_a_refused_frame_refuses_its_messages() -> None:
    async def script(connection: Connection) -> None:
        await connection.accept()
        publish = await connection.expect(Publish)
        await connection.send(Refusal(publish.request, "store_full", "no room", temporary=True))
        await connection.serve()

    async with peer(script) as address, Client(address, group="g") as client:
        with pytest.raises(Refused, match="no room"):
            await client.send(message())
        await client.send(message())


@both_loops
async def test_a_message_that_cannot_be_encoded_fails_alone() -> None:
    async with peer(well) as address, Client(address, group="g") as client:
        bad = message()
        bad.ttl = -1
        with pytest.raises(ValueError, match="ttl"):
            await client.send(bad)
        for order in ([bad], [bad, message()], [message(), bad], [message(), bad, message()]):
            with pytest.raises(PartlySent) as caught:
                await client.send_many(order)
            assert [isinstance(result, ValueError) for result in caught.value.results] == [one is bad for one in order]


@both_loops
async def test_what_is_no_message_is_refused_and_the_client_goes_on() -> None:
    wrong: Any = "order 17"
    async with peer(well) as address, Client(address, group="g", topics=["trade"]) as client:
        with pytest.raises(ValueError, match="must be a Message"):
            await client.send(wrong)
        with pytest.raises(ValueError, match="must be a Message"):
            await client.send_many([message(), wrong])
        with pytest.raises(ValueError, match="must be a Message"):
            await client.prepare(message(), wrong)
        assert client.statistics().sent == 0
        assert (await client.send(message())).durable


@both_loops
async def test_no_more_than_max_in_flight_are_unanswered() -> None:
    sizes: list[int] = []

    async def script(connection: Connection) -> None:
        await connection.accept()
        waiting: list[Publish] = []
        while sum(sizes) < 100:
            waiting.append(await connection.expect(Publish))
            sizes.append(len(waiting[-1].messages))
            if sum(len(publish.messages) for publish in waiting) == 10:
                with anyio.move_on_after(0.005):
                    raise AssertionError(await connection.receive())
                await connection.send(*(Receipts(publish.request, 1, True, []) for publish in waiting))
                waiting.clear()
        await connection.serve()

    async with peer(script) as address, Client(address, group="g", max_in_flight=10) as client:
        receipts = await client.send_many(message() for _ in range(100))
        assert len(receipts) == 100


@both_loops
async def test_large_messages_travel_alone_and_stay_in_order() -> None:
    bodies = [b"%d" % number * size for number, size in enumerate([1, 300_000, 2, 900_000, 900_000, 3])]
    seen: list[Packet] = []

    async def script(connection: Connection) -> None:
        await connection.accept()
        await connection.serve(seen)

    async with peer(script) as address, Client(address, group="g") as client:
        await client.send_many([message(body) for body in bodies])
    lengths = [len(blob) for packet in seen if isinstance(packet, Publish) for blob in packet.messages]
    assert lengths == [len(message(body).encoded()) for body in bodies]


@both_loops
async def test_a_cancelled_send_leaves_the_client_working() -> None:
    async def script(connection: Connection) -> None:
        await connection.accept()
        publish = await connection.expect(Publish)
        await anyio.sleep(0.05)
        await connection.send(Receipts(publish.request, 1, True, []))
        await connection.serve()

    async with peer(script) as address, Client(address, group="g", max_in_flight=1) as client:
        with anyio.move_on_after(0.01) as scope:
            await client.send_many([message(), message()])
        assert scope.cancelled_caught
        await client.send(message())
        assert client.statistics().in_flight == 0


@both_loops
async def test_after_a_goodbye_of_the_broker_messages_wait_for_the_next_connection() -> None:
    said = anyio.Event()

    async def leaving(connection: Connection) -> None:
        await connection.accept()
        publish = await connection.expect(Publish)
        await connection.send(Goodbye(0, "maintenance"))
        said.set()
        await anyio.sleep(0.02)
        await connection.send(Receipts(publish.request, 7, True, []))
        await connection.expect(Goodbye)

    async with peer(leaving, well) as address, Client(address, group="g") as client, anyio.create_task_group() as tasks:

        async def first() -> None:
            assert (await client.send(message())).groups == 7

        tasks.start_soon(first)
        await said.wait()
        await anyio.sleep(0.01)
        assert (await client.send(message())).groups == 1


@both_loops
async def test_garbage_ends_the_connection_and_another_is_made() -> None:
    async def garbage(connection: Connection) -> None:
        await connection.accept()
        await connection.stream.send(b"\0\0\0\3abc")
        refusal = await connection.expect(Refusal)
        assert refusal.request == 0

    async with peer(garbage, well) as address, Client(address, group="g") as client:
        await client.send(message())


@both_loops
async def test_a_client_works_only_inside_its_block() -> None:
    async with peer(well) as address:
        client = Client(address, group="g")
        with pytest.raises(ClientClosed):
            await client.send(message())
        async with client:
            await client.send(message())
        with pytest.raises(ClientClosed):
            await client.send(message())
        with pytest.raises(RuntimeError, match="once"):
            await client.__aenter__()
