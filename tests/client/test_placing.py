"""Where half messages go: which broker, in which packet, within which window."""

from __future__ import annotations

import anyio
import pytest

from kiteq.limits import MIB, PUBLISH_MESSAGES_MAX
from kiteq.remoting.packets import Decide, Enlist, Goodbye, Hello, Prepare, Publish, Receipts
from kiteq_client import (
    Client,
    Message,
    Outcome,
    Refused,
)
from kiteq_client.outgoing import FRAME_BYTES
from tests.client.ledger import Ledger, everything, until
from tests.client.parts import message
from tests.client.peer import Connection, both_loops, peer


@both_loops
async def test_what_many_tasks_do_in_one_moment_leaves_in_one_packet() -> None:
    ledger = Ledger()
    prepared = anyio.Event()

    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:

        async def transact(number: int) -> None:
            sizes = 2 if number == 7 else 1
            async with client.transaction(*(message() for _ in range(sizes))):
                await prepared.wait()

        async with anyio.create_task_group() as tasks:
            for number in range(100):
                tasks.start_soon(transact, number)
            await until(lambda: len(ledger.open) == 100)
            prepared.set()
        assert len(ledger.committed) == 100
    [prepare] = ledger.packets(Prepare)
    assert isinstance(prepare.sizes, list)
    assert sorted(prepare.sizes) == [1] * 99 + [2]
    [decide] = ledger.packets(Decide)
    assert len(decide.tokens) == 100


@both_loops
async def test_a_packet_has_a_size_and_transactions_are_not_split_by_it() -> None:
    ledger = Ledger()
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], max_in_flight=10_000) as client,
        anyio.create_task_group() as tasks,
    ):

        async def transact(*messages: Message) -> None:
            async with client.transaction(*messages):
                pass

        for _ in range(100):
            tasks.start_soon(transact, *(message() for _ in range(7)))
        for _ in range(10):
            tasks.start_soon(transact, message(bytes(100_000)))
    assert len(ledger.committed) == 110
    frames = [packet.messages for packet in ledger.packets(Prepare)]
    assert 100 < max(map(len, frames)) <= PUBLISH_MESSAGES_MAX
    assert max(sum(map(len, frame)) for frame in frames) <= FRAME_BYTES


@both_loops
async def test_a_packet_has_one_check_after() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:

        async def transact(check_after: float | None) -> None:
            async with client.transaction(message(), check_after=check_after):
                pass

        async with anyio.create_task_group() as tasks:
            for check_after in (None, None, 2, 2, None):
                tasks.start_soon(transact, check_after)
    times = [prepare.check_after_ms for prepare in ledger.packets(Prepare) for _ in prepare.messages]
    assert sorted(times) == [0, 0, 0, 2_000, 2_000]
    assert len(ledger.packets(Prepare)) < 6


@both_loops
async def test_a_transaction_of_many_bytes_is_prepared_in_parts() -> None:
    ledger = Ledger()
    messages = [message(bytes(200_000)) for _ in range(9)]
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        async with client.transaction(*messages) as tx:
            assert ledger.open[tx.id] == [one.encoded() for one in messages]
        many = [message() for _ in range(600)]
        async with client.transaction(*many) as tx:
            assert ledger.open[tx.id] == [one.encoded() for one in many]
    frames = [packet.messages for packet in ledger.packets(Prepare)] + [one.messages for one in ledger.packets(Enlist)]
    assert max(sum(map(len, frame)) for frame in frames) <= MIB / 2
    assert len(ledger.committed) == 2


@both_loops
async def test_a_part_that_is_refused_rolls_the_others_back() -> None:
    ledger = Ledger()
    ledger.refuse = lambda packet: ("store_full", True) if isinstance(packet, Enlist) else None
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        one = message(bytes(400_000))
        with pytest.raises(Refused, match="store_full"):
            async with client.transaction(one, message(bytes(400_000))):
                raise AssertionError
        await until(lambda: ledger.rolled_back == {one.id} and not client._transactions._halves)


@both_loops
async def test_after_a_goodbye_of_the_broker_decisions_go_out_and_what_is_new_waits() -> None:
    ledger = Ledger()

    async def leaving(connection: Connection) -> None:
        await connection.accept()
        await connection.send(ledger.answered(await connection.expect(Prepare)))
        # Something unanswered keeps the client from saying goodbye at once.
        unanswered = await connection.expect(Publish)
        await connection.send(Goodbye(0, "maintenance"))
        decision = await connection.expect(Decide)
        await connection.send(ledger.answered(decision), Receipts(unanswered.request, 1, True, []))
        await connection.expect(Goodbye)

    async with peer(leaving, ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        [session] = client._brokers.sessions()
        async with client.transaction(message()) as tx, anyio.create_task_group() as tasks:
            tasks.start_soon(client.send, message())
            await session.goodbye.wait()

            async def begin() -> None:
                async with client.transaction(message()):
                    pass

            tasks.start_soon(begin)
            await anyio.sleep(0.01)
            await client.commit(tx.id)
            assert ledger.committed == {tx.id}
        assert client.statistics().reconnects == 1
    assert len(ledger.committed) == 2


@both_loops
async def test_a_transaction_waits_for_the_first_broker() -> None:
    ledger = Ledger()
    entered = anyio.Event()

    async def slow(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await entered.wait()
        connection._packets.append(hello)
        await ledger.script(connection)

    async with (
        peer(slow) as address,
        Client(address, group="g", topics=["trade"], wait=False) as client,
        anyio.create_task_group() as tasks,
    ):

        async def transact() -> None:
            async with client.transaction(message()):
                pass

        tasks.start_soon(transact)
        await anyio.sleep(0.01)
        entered.set()
    assert len(ledger.committed) == 1


@both_loops
async def test_half_messages_share_the_window_with_others_and_are_not_starved() -> None:
    ledger = Ledger()
    most = 0

    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"], max_in_flight=4) as client:

        async def transact() -> None:
            nonlocal most
            async with client.transaction(message(), message()):
                most = max(most, client.statistics().in_flight)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.send_many, [message() for _ in range(100)])
            for _ in range(20):
                tasks.start_soon(transact)
        async with client.transaction(*(message() for _ in range(10))) as tx:
            pass
        assert tx.outcome is Outcome.COMMITTED
        assert client.statistics().in_flight == 0
    assert most <= 4
    assert len(ledger.committed) == 21
    assert max(len(prepare.messages) for prepare in ledger.packets(Prepare)[:-1]) <= 4
    kinds = [type(packet) for packet in ledger.seen if isinstance(packet, Prepare | Publish)]
    assert kinds.index(Prepare) < len(kinds) - 1 - kinds[::-1].index(Publish)


@both_loops
async def test_the_room_of_a_cancelled_transaction_is_free_again() -> None:
    ledger = Ledger()
    ledger.lose = everything
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], max_in_flight=2, timeout=1) as client,
    ):
        async with anyio.create_task_group() as tasks:

            async def transact(*messages: Message) -> None:
                async with client.transaction(*messages):
                    raise AssertionError

            tasks.start_soon(transact, message(), message())
            await until(lambda: ledger.open)
            tasks.start_soon(transact, message(), message())
            tasks.start_soon(client.send, message())
            await anyio.sleep(0.01)
            assert client._producer.outgoing._wanted
            tasks.cancel_scope.cancel()
        assert len(ledger.packets(Prepare)) == 1
        assert not client._producer.outgoing._wanted
        ledger.lose = lambda _packet: False


@both_loops
async def test_the_broker_with_the_least_to_answer_is_chosen_and_keeps_the_whole_transaction() -> None:
    ledgers = [Ledger("b1"), Ledger("b2")]
    async with (
        peer(ledgers[0].script) as one,
        peer(ledgers[1].script) as two,
        Client(f"kiteq://{one},{two}", group="g", topics=["trade"], timeout=1) as client,
    ):
        ledgers[0].lose = everything

        async def transact() -> None:
            async with client.transaction(message()) as tx:
                await tx.add(message())

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(transact)
            await until(lambda: ledgers[0].open and len(ledgers[1].committed) == 10)
            # The first has ten to answer now, and the second none.
            async with anyio.create_task_group() as more:
                for _ in range(10):
                    more.start_soon(transact)
            tasks.cancel_scope.cancel()
        assert len(ledgers[1].committed) == 20
        assert len(ledgers[0].packets(Prepare)) == 1
        assert not ledgers[0].packets(Enlist)
        ledgers[0].lose = lambda _packet: False
    assert len(ledgers[0].rolled_back) == 10


@both_loops
async def test_what_waits_for_a_broker_that_stands_still_goes_to_another() -> None:
    ledger, enough = Ledger("b2"), anyio.Event()

    async def still(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await enough.wait()  # reads nothing, so that the line is full
        await ledger.serve(connection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kiteq_client.spread.LATE_SECONDS", 0.3)
        async with (
            peer(still) as one,
            peer(ledger.script) as two,
            Client(f"kiteq://{one},{two}", group="g", topics=["trade"], timeout=3) as client,
            anyio.create_task_group() as tasks,
        ):
            await until(lambda: len(client.statistics().connected) == 2)
            tasks.start_soon(client.send_many, [message(bytes(MIB - 100)) for _ in range(16)])
            await until(lambda: any(broker.is_writing for broker in client._brokers.all))

            async def transact() -> None:
                async with client.transaction(message()):
                    pass

            async with anyio.create_task_group() as many:
                for _ in range(60):
                    many.start_soon(transact)
            assert len(ledger.committed) == 60
            enough.set()


@both_loops
async def test_what_waits_for_a_broker_that_left_goes_to_another() -> None:
    ledger = Ledger("b2")
    gone = anyio.Event()

    async def leaving(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await connection.expect(Prepare)
        await gone.wait()

    async def late(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await gone.wait()
        connection._packets.append(hello)
        await ledger.script(connection)

    async def never(connection: Connection) -> None:
        await anyio.sleep_forever()

    async with (
        peer(leaving, never) as one,
        peer(late) as two,
        Client(f"kiteq://{one},{two}", group="g", topics=["trade"], max_in_flight=2, wait=False) as client,
        anyio.create_task_group() as tasks,
    ):
        await until(lambda: client.statistics().connected)
        moved = message()

        async def stay() -> None:
            with scope:
                async with client.transaction(message()):
                    raise AssertionError

        async def move() -> None:
            async with client.transaction(moved, message()):
                pass
            client._brokers.all[:] = [broker for broker in client._brokers.all if broker.session is not None]

        scope = anyio.CancelScope()
        tasks.start_soon(stay)
        await until(lambda: client.statistics().in_flight == 1)
        tasks.start_soon(move)
        await anyio.sleep(0.01)
        assert sum(len(broker.preparing.waiting) for broker in client._brokers.all) == 1
        gone.set()
        scope.cancel()
    assert ledger.committed == {moved.id}
