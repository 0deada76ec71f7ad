"""Several brokers of a list: which one gets what, and what happens when one stands still or leaves."""

from __future__ import annotations

from contextlib import suppress

import anyio
import pytest

from kiteq.message import decode
from kiteq.remoting.packets import Brokers, Decide, Goodbye, Hello, Packet, Prepare, Publish, Refusal
from kiteq_client import Client, NotConnected, PartlySent, Refused, SendTimeout, direct
from kiteq_client.registry import Address, parse_registry
from tests.client.ledger import Ledger, hurried, until, warnings
from tests.client.parts import message
from tests.client.peer import Connection, both_loops, peer


def is_publish(packet: Packet) -> bool:
    return isinstance(packet, Publish)


def bodies(ledger: Ledger) -> list[bytes]:
    return [decode(blob, "g", 1).body for packet in ledger.packets(Publish) for blob in packet.messages]


@both_loops
async def test_new_messages_go_to_the_broker_with_the_fewest_unanswered() -> None:
    ledgers = [Ledger("b1"), Ledger("b2")]
    async with (
        peer(ledgers[0].script) as one,
        peer(ledgers[1].script) as two,
        Client(f"kiteq://{one},{two}", group="g", timeout=2) as client,
        anyio.create_task_group() as tasks,
    ):
        ledgers[0].lose = ledgers[1].lose = is_publish
        tasks.start_soon(client.send, message())
        await until(lambda: sum(len(ledger.packets(Publish)) for ledger in ledgers) == 1)
        silent, other = sorted(ledgers, key=lambda ledger: len(ledger.packets(Publish)), reverse=True)
        other.lose = lambda _packet: False
        receipts = [await client.send(message()) for _ in range(20)]
        assert {receipt.broker for receipt in receipts} == {other.broker}
        assert len(silent.packets(Publish)) == 1
        tasks.cancel_scope.cancel()


@both_loops
async def test_a_broker_that_refuses_for_a_while_is_left_alone_and_the_others_go_on() -> None:
    refusals = 0

    async def full(connection: Connection) -> None:
        nonlocal refusals
        await connection.accept(broker="full")
        while isinstance(packet := await connection.receive(), Publish | Goodbye):
            if isinstance(packet, Goodbye):
                return
            refusals += 1
            await connection.send(Refusal(packet.request, "store_full", "no room", temporary=True))

    other = Ledger("other")
    async with peer(full) as one, peer(other.script) as two, Client(f"kiteq://{one},{two}", group="g") as client:
        results: list[object] = []
        for _ in range(100):
            with suppress(Refused):
                results.append((await client.send(message())).broker)
        assert set(results) == {"other"}
        assert len(results) + refusals == 100
        assert 1 <= refusals <= 5  # one a second, on a slow machine


@both_loops
async def test_a_program_that_sends_one_by_one_uses_all_brokers() -> None:
    ledgers = [Ledger("b1"), Ledger("b2"), Ledger("b3")]
    async with (
        peer(ledgers[0].script) as one,
        peer(ledgers[1].script) as two,
        peer(ledgers[2].script) as three,
        Client(f"kiteq://{one},{two},{three}", group="g") as client,
    ):
        await until(lambda: len(client._brokers.sessions()) == 3)
        for _ in range(9):
            await client.send(message())
        assert [len(ledger.packets(Publish)) for ledger in ledgers] == [3, 3, 3]
        for _ in range(9):
            await client.prepare(message())
        assert [len(ledger.packets(Prepare)) for ledger in ledgers] == [3, 3, 3]


@both_loops
async def test_one_call_is_spread_and_keeps_its_order_at_each_broker() -> None:
    ledgers = [Ledger("b1"), Ledger("b2"), Ledger("b3")]
    async with (
        peer(ledgers[0].script) as one,
        peer(ledgers[1].script) as two,
        peer(ledgers[2].script) as three,
        Client(f"kiteq://{one},{two},{three}", group="g") as client,
    ):
        receipts = await client.send_many(message(b"%05d" % number) for number in range(5_000))
    for ledger in ledgers:
        got = bodies(ledger)
        assert got == sorted(got)
        assert len(got) > 500
        assert [receipts[int(body)].broker for body in got] == [ledger.broker] * len(got)
    assert sum(len(bodies(ledger)) for ledger in ledgers) == 5_000


@both_loops
async def test_a_broker_that_stands_still_keeps_its_share_of_the_window_and_the_others_go_on() -> None:
    still, other = Ledger("b1"), Ledger("b2")
    still.lose = is_publish
    failed: list[SendTimeout] = []
    async with (
        peer(still.script) as one,
        peer(other.script) as two,
        Client(f"kiteq://{one},{two}", group="g", max_in_flight=10, timeout=0.5) as client,
    ):

        async def send(times: int) -> None:
            for _ in range(times):
                try:
                    await client.send(message())
                except SendTimeout as error:
                    failed.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(40):
                tasks.start_soon(send, 25)
        assert len(bodies(other)) + len(bodies(still)) == 1_000
        assert len(failed) == len(bodies(still)) <= 5
        # What nobody waits for any more is not in the way of the other.
        assert client.statistics().in_flight == 0
        with pytest.raises(PartlySent) as caught:
            still.lose, other.lose = is_publish, is_publish
            await client.send_many(message() for _ in range(100))
        assert {type(result) for result in caught.value.results} == {SendTimeout}


@both_loops
async def test_a_broker_that_does_not_answer_half_messages_gets_nothing_new() -> None:
    await _stands_still_and_gets_nothing_new(Prepare)


@both_loops
async def test_a_broker_that_does_not_answer_decisions_gets_nothing_new() -> None:
    await _stands_still_and_gets_nothing_new(Decide)


async def _stands_still_and_gets_nothing_new(unanswered: type[Packet]) -> None:
    still, other = Ledger("b1"), Ledger("b2")
    still.lose = lambda packet: isinstance(packet, unanswered)
    async with (
        peer(still.script) as one,
        peer(other.script) as two,
        Client(f"kiteq://{one},{two}", group="g", topics=["trade"], timeout=3) as client,
        anyio.create_task_group() as tasks,
    ):
        await until(lambda: len(client._brokers.sessions()) == 2)

        async def transact() -> None:
            async with client.transaction(message()):
                pass

        tasks.start_soon(transact)
        tasks.start_soon(transact)
        await until(lambda: still.packets(unanswered) and len(other.committed) == 1)
        before = len(still.seen)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("kiteq_client.spread.LATE_SECONDS", 0.5)  # on a busy machine the other is late too by less
            await anyio.sleep(0.51)
            async with anyio.create_task_group() as many:
                for _ in range(20):
                    many.start_soon(transact)
                    many.start_soon(client.send, message())
        assert len(still.seen) == before
        assert len(other.committed) == 21
        with hurried(client):
            tasks.cancel_scope.cancel()
        still.lose = lambda _packet: False


@both_loops
async def test_what_is_unanswered_follows_its_broker_to_another_address() -> None:
    moved, ledger = anyio.Event(), Ledger("b1")

    async def drop(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await connection.expect(Publish)
        moved.set()

    async def other(connection: Connection) -> None:
        await connection.accept(broker="b2")
        await connection.serve()

    async def late(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await moved.wait()
        connection._packets.append(hello)
        await ledger.script(connection)

    async with (
        peer(drop, other) as one,
        peer(late) as two,
        Client(f"kiteq://{one},{two}", group="g", wait=False) as client,
    ):
        await until(lambda: client.statistics().connected)
        assert (await client.send(message())).broker == "b1"


# --- sets of brokers -------------------------------------------------------------------------------


@both_loops
async def test_a_broker_tells_of_its_set_and_all_of_it_is_used() -> None:
    ledgers = [Ledger("b1"), Ledger("b2")]
    told = anyio.Event()

    async def first(connection: Connection) -> None:
        await connection.accept(broker="b1", version=2)
        await connection.send(Brokers(0, [f":{one.rpartition(':')[2]}", two]))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ledgers[0].serve, connection)
            await told.wait()
            await connection.send(Brokers(0, [f":{one.rpartition(':')[2]}"]))

    async def second(connection: Connection) -> None:
        await connection.accept(broker="b2", version=2)
        await ledgers[1].serve(connection)

    async with (
        peer(first) as one,
        peer(second) as two,
        Client(one, group="g", bindings=[direct("trade", "pay")]) as client,
    ):
        await until(lambda: client.statistics().connected == (one, two))
        [connection] = ledgers[1].connections
        assert connection.hello is not None
        assert connection.hello.bindings[0][:3] == ["trade", 0, "pay"]
        await client.send_many(message() for _ in range(1_000))
        assert bodies(ledgers[0])
        assert bodies(ledgers[1])
        told.set()
        await until(lambda: not client._brokers.diallers[_address(two)].listed)
        assert client.statistics().connected == (one, two)  # it is used as long as it lives
        await connection.stream.aclose()
        await until(lambda: _address(two) not in client._brokers.diallers)
        assert client.statistics().connected == (one,)
        assert client.statistics().not_reached == {}
        assert len(ledgers[1].connections) <= 1


@both_loops
async def test_a_broker_of_version_1_must_not_tell_of_others() -> None:
    async def wrong(connection: Connection) -> None:
        await connection.accept()
        await connection.send(Brokers(0, ["127.0.0.1:1"]))
        refusal = await connection.expect(Refusal)
        assert (refusal.request, refusal.code) == (0, "bad_frame")

    async def garbled(connection: Connection) -> None:
        await connection.accept(version=2)
        await connection.send(Brokers(0, ["127.0.0.1:x"]))
        refusal = await connection.expect(Refusal)
        assert "wrong address" in refusal.reason

    async with peer(wrong, garbled, Ledger().script) as address, Client(address, group="g") as client:
        await until(lambda: client.statistics().reconnects == 2)
        await client.send(message())


@both_loops
async def test_a_version_that_was_not_offered_is_refused() -> None:
    async def newer(connection: Connection) -> None:
        await connection.accept(version=3)

    async with peer(newer) as address:
        with pytest.raises(NotConnected):
            async with Client(address, group="g", timeout=0.2):
                raise AssertionError
        async with Client(address, group="g", timeout=0.2, wait=False) as client:
            await until(lambda: "wire version 3" in client.statistics().not_reached.get(address, ""))


@both_loops
async def test_one_broker_at_two_addresses_is_used_once_until_the_first_connection_ends() -> None:
    ledger = Ledger("b1")
    twins = 0

    async def twin(connection: Connection) -> None:
        nonlocal twins
        twins += 1
        await ledger.script(connection)

    with warnings() as warned:
        async with (
            peer(ledger.script, never) as one,
            peer(twin) as two,
            Client(f"kiteq://{one},{two}", group="g") as client,
        ):
            assert len(client.statistics().connected) == 1
            assert client.statistics().not_reached == {}
            await client.send_many(message() for _ in range(1_000))
            await until(lambda: len(ledger.connections) == 1)
            assert twins == 1
            if client.statistics().connected == (one,):
                await ledger.connections[0].stream.aclose()
                await until(lambda: client.statistics().connected == (two,))
            await client.send(message())
    assert len(bodies(ledger)) == 1_001
    assert len(warned) <= 1  # of the connection that was lost


@both_loops
async def test_the_other_address_of_a_broker_that_is_gone_is_tried_until_it_answers() -> None:
    ledger, first = Ledger("b1"), anyio.Event()

    async def twin(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await first.wait()
        connection._packets.append(hello)
        await ledger.script(connection)

    async def hang_up(_connection: Connection) -> None: ...

    async with (
        peer(ledger.script, never) as one,
        peer(twin, hang_up, ledger.script) as two,
        Client(f"kiteq://{one},{two}", group="g", wait=False) as client,
    ):
        await until(lambda: client.statistics().connected == (one,))
        first.set()
        await until(lambda: client._brokers.diallers[_address(two)].twin and len(ledger.connections) == 1)
        await ledger.connections[0].stream.aclose()
        await until(lambda: client.statistics().connected == (two,))


@both_loops
async def test_a_broker_that_somebody_waits_for_is_dialled_again_soon() -> None:
    ledger = Ledger("b1")

    async def hang_up(_connection: Connection) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RECONNECT_SECONDS_MIN", "RECONNECT_SECONDS_MAX"):
            patch.setattr(f"kiteq_client.dialler.{name}", 60.0)
        async with (
            peer(hang_up, ledger.script) as one,
            Client(one, group="g", topics=["trade"], wait=False) as client,
            anyio.create_task_group() as tasks,
        ):
            await until(lambda: "greeting" in client.statistics().not_reached[one])
            tasks.start_soon(client.prepare, message())
            await until(lambda: client.statistics().connected == (one,))


@both_loops
async def test_what_is_refused_when_it_is_sent_again_may_be_stored_and_is_no_refusal() -> None:
    async def drop(connection: Connection) -> None:
        await connection.accept()
        await connection.expect(Publish)

    async def full(connection: Connection) -> None:
        await connection.accept()
        for code in ("store_full", "store_full"):
            packet = await connection.expect(Publish)
            await connection.send(Refusal(packet.request, code, "no room", temporary=True))
        await connection.serve()

    async with peer(drop, full) as address, Client(address, group="g") as client:
        with pytest.raises(SendTimeout, match=r"no room \[store_full\], when it was sent again: whether it is stored"):
            await client.send(message())
        with pytest.raises(Refused, match="no room"):
            await client.send(message())
        assert client.statistics().in_flight == 0


@both_loops
async def test_an_address_that_cannot_be_one_is_a_broker_not_reached() -> None:
    ledger = Ledger("b1")
    async with peer(ledger.script) as one, Client(f"kiteq://{one},bü_x:1", group="g") as client:
        await until(lambda: "could not be reached" in client.statistics().not_reached.get("bü_x:1", ""))
        await client.send(message())


async def never(_connection: Connection) -> None:
    await anyio.sleep_forever()


def _address(text: str) -> Address:
    [address] = parse_registry(text)
    return address
