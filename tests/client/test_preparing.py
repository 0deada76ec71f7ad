"""Beginning a transaction: half messages that are durable before the block runs, or nothing at all."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from kiteq.remoting.packets import DECISION_ROLLBACK, Decide, Enlist, Packet, Prepare, Prepared, Refusal
from kiteq_client import (
    Client,
    ClientClosed,
    Message,
    MessageTooLarge,
    NotConnected,
    Outcome,
    Refused,
    SendTimeout,
    TransactionConflict,
)
from tests.client.ledger import Ledger, hurried, until, warnings
from tests.client.parts import message
from tests.client.peer import Connection, both_loops, peer


def is_prepare(packet: Packet) -> bool:
    return isinstance(packet, Prepare)


@both_loops
async def test_half_messages_are_durable_when_the_block_begins_and_committed_when_it_is_left() -> None:
    ledger = Ledger()
    one, two, three = message(b"1"), message(b"2", "feed"), message(b"3")
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade", "feed"]) as client:
        async with client.transaction(one, two, check_after=1.5) as tx:
            assert ledger.open == {one.id: [one.encoded(), two.encoded()]}
            assert (tx.id, tx.outcome) == (one.id, Outcome.OPEN)
            await tx.add(three)
            assert ledger.open == {one.id: [one.encoded(), two.encoded(), three.encoded()]}
            assert not ledger.decided
        assert ledger.committed == {one.id}
        assert tx.outcome is Outcome.COMMITTED
        assert client.statistics().committed == 1
        assert client.statistics().in_flight == 0
    [prepare] = ledger.packets(Prepare)
    assert (prepare.sizes, prepare.check_after_ms) == (2, 1_500)
    [decide] = ledger.packets(Decide)
    assert decide.tokens == [one.id + (100).to_bytes(8, "big")]


def test_what_cannot_be_in_a_transaction_is_refused_before_anything_is_sent() -> None:
    client = Client("localhost:1", group="g")
    with pytest.raises(ValueError, match="needs a message"):
        client.transaction()
    with pytest.raises(ValueError, match="fly"):
        client.transaction(message(), Message("trade", "pay", fly=True))
    same = message()
    with pytest.raises(ValueError, match="different ids"):
        client.transaction(same, same)
    bad = message()
    bad.ttl = -1
    with pytest.raises(ValueError, match="ttl"):
        client.transaction(bad)
    for check_after in (0, -1, 1e9, float("nan")):
        with pytest.raises(ValueError, match="check_after"):
            client.transaction(message(), check_after=check_after)


@both_loops
async def test_a_refused_prepare_raises_before_the_body_runs_and_the_message_can_be_used_again() -> None:
    ledger = Ledger()
    ledger.refuse = lambda packet: ("half_quota", True) if is_prepare(packet) else None
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        one = message()
        with pytest.raises(Refused) as caught:
            async with client.transaction(one):
                raise AssertionError
        assert (caught.value.code, caught.value.temporary) == ("half_quota", True)
        ledger.refuse = lambda _packet: None
        async with client.transaction(one) as tx:
            pass
        assert tx.outcome is Outcome.COMMITTED
    assert ledger.committed == {one.id}
    assert not ledger.rolled_back


@both_loops
async def test_one_refused_transaction_of_a_packet_fails_alone() -> None:
    ledger = Ledger()
    used = message()
    ledger.decided[used.id] = DECISION_ROLLBACK
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        outcomes: list[object] = []

        async def transact(one: Message) -> None:
            try:
                async with client.transaction(one) as tx:
                    pass
                outcomes.append(tx.outcome)
            except TransactionConflict as error:
                outcomes.append(error.code)

        async with anyio.create_task_group() as tasks:
            for one in (message(), used, message()):
                tasks.start_soon(transact, one)
        assert sorted(map(str, outcomes)) == ["committed", "committed", "transaction_conflict"]
    assert len(ledger.packets(Prepare)) == 1


@both_loops
async def test_too_large_a_body_is_refused_and_nothing_is_stored() -> None:
    ledger = Ledger()

    async def script(connection: Connection) -> None:
        await connection.accept(body_bytes=1_000)
        await ledger.serve(connection)

    async with peer(script) as address, Client(address, group="g", topics=["trade"]) as client:
        with pytest.raises(MessageTooLarge):
            async with client.transaction(message(), message(bytes(1_001))):
                raise AssertionError
        async with client.transaction(message()) as tx:
            with pytest.raises(MessageTooLarge):
                await tx.add(message(bytes(1_001)))
        assert tx.outcome is Outcome.COMMITTED
        assert client.statistics().in_flight == 0
    assert [len(prepare.messages) for prepare in ledger.packets(Prepare)] == [1]


@both_loops
async def test_an_unanswered_prepare_is_sent_again_byte_for_byte_after_a_reconnect() -> None:
    ledger = Ledger()
    first: list[Packet] = []

    async def drop(connection: Connection) -> None:
        await connection.accept()
        first.append(await connection.expect(Prepare))

    async with peer(drop, ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        async with client.transaction(message()) as tx:
            assert ledger.packets(Prepare) == first
        assert tx.outcome is Outcome.COMMITTED


@both_loops
async def test_what_is_refused_when_it_is_sent_again_may_be_stored_and_is_rolled_back() -> None:
    ledger = Ledger()

    async def drop(connection: Connection) -> None:
        await connection.accept()
        ledger.answer(await connection.expect(Prepare))
        ledger.refuse = lambda packet: ("store_full", True) if is_prepare(packet) else None

    one = message()
    async with peer(drop, ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        with pytest.raises(SendTimeout, match=r"store_full.* not begun and is rolled back"):
            async with client.transaction(one):
                raise AssertionError
        await until(lambda: ledger.rolled_back == {one.id})


@both_loops
async def test_what_is_refused_when_it_is_added_again_may_have_been_added() -> None:
    ledger = Ledger()

    async def drop(connection: Connection) -> None:
        await connection.accept()
        await connection.send(ledger.answered(await connection.expect(Prepare)))
        ledger.answer(await connection.expect(Enlist))
        ledger.refuse = lambda packet: ("store_full", True) if isinstance(packet, Enlist) else None

    async with peer(drop, ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        async with client.transaction(message()) as tx:
            with pytest.raises(SendTimeout, match=r"store_full.* whether the message was added is unknown"):
                await tx.add(message())
            with pytest.raises(Refused, match="store_full"):
                await tx.add(message())
        assert ledger.committed == {tx.id}


@both_loops
async def test_another_broker_at_the_address_does_not_get_what_one_did_not_answer() -> None:
    other = Ledger("b2")

    async def drop(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await connection.expect(Prepare)

    async with peer(drop, other.script) as address, Client(address, group="g", topics=["trade"]) as client:
        with pytest.raises(SendTimeout, match="b2"):
            async with client.transaction(message()):
                raise AssertionError
        async with client.transaction(message()) as tx:
            pass
        assert tx.outcome is Outcome.COMMITTED
    assert len(other.packets(Prepare)) == 1


@both_loops
async def test_without_an_answer_entering_fails_and_the_transaction_is_rolled_back() -> None:
    ledger = Ledger()
    ledger.lose = is_prepare
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"], timeout=1) as client:
        one = message()
        tx = client.transaction(one)
        with hurried(client), pytest.raises(SendTimeout, match="not begun"):
            async with tx:
                raise AssertionError
        assert tx.outcome is Outcome.ROLLED_BACK
        await until(lambda: ledger.rolled_back == {one.id})
        await until(lambda: not client._transactions._halves)
    assert not ledger.open


@both_loops
async def test_a_prepare_answered_too_late_is_rolled_back_again() -> None:
    """The first rollback met a broker that had not stored it yet."""
    decided: list[bytes] = []

    async def script(connection: Connection) -> None:
        await connection.accept()
        ledger = Ledger()
        prepare = await connection.expect(Prepare)
        decide = await connection.expect(Decide)
        await connection.send(ledger.answered(decide), ledger.answered(prepare))
        decide = await connection.expect(Decide)
        assert decide.decision == DECISION_ROLLBACK
        decided.extend(decide.tokens)
        await connection.send(ledger.answered(decide))
        await connection.serve()

    async with peer(script) as address, Client(address, group="g", topics=["trade"], timeout=1) as client:
        one = message()
        with hurried(client), pytest.raises(SendTimeout):
            async with client.transaction(one):
                raise AssertionError
        with pytest.raises(TransactionConflict, match="make a new Message"):
            async with client.transaction(one):
                raise AssertionError
        await until(lambda: not client._transactions._halves)
        assert client.statistics().unknown_transactions == 0
    assert decided == [one.id + (100).to_bytes(8, "big")]


@both_loops
async def test_what_was_given_up_is_rolled_back_when_the_broker_asks() -> None:
    ledger = Ledger()
    one = message()

    async def silent(connection: Connection) -> None:
        await connection.accept()
        ledger.answer(await connection.expect(Prepare))
        await connection.expect(Decide)

    async def asking(connection: Connection) -> None:
        await connection.accept()
        ledger.refuse = lambda packet: ("unknown_transaction", False) if isinstance(packet, Decide) else None
        decide = await connection.expect(Decide)
        await connection.send(ledger.answered(decide))
        ledger.refuse = lambda _packet: None
        ledger.connections.append(connection)
        await ledger.ask(one.id)
        ledger.connections.clear()
        await ledger.serve(connection)

    async with (
        peer(silent, asking) as address,
        Client(address, group="g", topics=["trade"], timeout=1) as client,
    ):
        with hurried(client), pytest.raises(SendTimeout):
            async with client.transaction(one):
                raise AssertionError
        await until(lambda: ledger.rolled_back == {one.id})
        await until(lambda: not client._transactions._halves)
        assert client.statistics().checks["rollback"] == 1


@both_loops
async def test_what_was_never_sent_is_not_rolled_back() -> None:
    async with Client("127.0.0.1:1", group="g", topics=["trade"], timeout=0.05, wait=False) as client:
        one = message()
        for _ in range(2):
            with pytest.raises(NotConnected):
                async with client.transaction(one):
                    raise AssertionError
        assert not client._transactions._halves
        assert client._transactions.pending == 0
        await anyio.sleep(0.02)
        assert not client._transactions.placing.unplaced


@both_loops
async def test_topics_that_were_not_named_are_warned_of_once() -> None:
    ledger = Ledger()
    with warnings() as texts:
        async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
            for _ in range(3):
                async with client.transaction(message(), message(topic="feed")):
                    pass
    assert [text[:44] for text in texts] == ["a transaction publishes to topic feed, which"]


@both_loops
async def test_a_block_is_entered_once_inside_the_client_only() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address:
        client = Client(address, group="g", topics=["trade"])
        with pytest.raises(ClientClosed):
            async with client.transaction(message()):
                raise AssertionError
        async with client:
            tx = client.transaction(message())
            with pytest.raises(RuntimeError, match="not entered"):
                await tx.add(message())
            async with tx:
                with pytest.raises(ValueError, match="open transaction already"):
                    async with client.transaction(Message("trade", "pay", id=tx.id)):
                        raise AssertionError
            with pytest.raises(RuntimeError, match="entered once"):
                async with tx:
                    raise AssertionError
            with pytest.raises(RuntimeError, match="committed"):
                await tx.add(message())
    assert len(ledger.packets(Prepare)) == 1


@both_loops
async def test_an_answer_that_does_not_fit_ends_the_connection() -> None:
    ledger = Ledger()

    async def wrong(handles: int | list[int], connection: Connection) -> None:
        await connection.accept()
        prepare = await connection.expect(Prepare)
        await connection.send(Prepared(prepare.request, handles, [[1, "no", "no", False]]))
        refusal = await connection.expect(Refusal)
        assert "speaks of others" in refusal.reason

    async with (
        peer(partial(wrong, 1), partial(wrong, [1, 2]), ledger.script) as address,
        Client(address, group="g", topics=["trade"]) as client,
    ):
        async with client.transaction(message()) as tx:
            pass
        assert tx.outcome is Outcome.COMMITTED
