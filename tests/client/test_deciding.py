"""Leaving a transaction: what became of it, and what the client does when the broker does not say."""

from __future__ import annotations

import anyio
import pytest

from kiteq.remoting.packets import DECISION_COMMIT, DECISION_ROLLBACK, Decide, Decided, Packet, Prepare, Refusal
from kiteq_client import (
    Client,
    ClientClosed,
    DecisionPending,
    Outcome,
    Refused,
    TransactionConflict,
    UnknownTransaction,
)
from tests.client.ledger import Ledger, hurried, transact, until, warnings
from tests.client.parts import OwnError, is_decide, message
from tests.client.peer import Connection, both_loops, peer


@both_loops
async def test_an_explicit_rollback_rolls_back_and_leaving_does_nothing_more() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        async with client.transaction(message()) as tx:
            await tx.rollback()
            assert tx.outcome is Outcome.ROLLED_BACK
            await tx.rollback()
            with pytest.raises(RuntimeError, match="rolled back"):
                await tx.add(message())
        with pytest.raises(OwnError):
            async with client.transaction(message()) as other:
                await other.rollback()
                raise OwnError
        assert ledger.rolled_back == {tx.id, other.id}
        assert other.outcome is Outcome.ROLLED_BACK
        assert client.statistics().rolled_back == 2
        async with client.transaction(message()) as tx:
            pass
        with pytest.raises(RuntimeError, match="committed already"):
            await tx.rollback()
    assert len(ledger.packets(Decide)) == 3


@both_loops
async def test_a_commit_without_an_answer_is_pending_and_goes_on() -> None:
    ledger = Ledger()
    ledger.lose = is_decide
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], timeout=1) as client,
    ):
        with warnings() as texts:
            await transact(client, tx := client.transaction(message()))
        assert tx.outcome is Outcome.PENDING
        assert client.statistics().pending_decisions == 1
        assert ["your local transaction stands" in text for text in texts] == [True]
        with pytest.raises(RuntimeError, match="pending"):
            await tx.rollback()
        with pytest.raises(DecisionPending, match="your local transaction stands"):
            await transact(client, confirmed := client.transaction(message(), confirm=True))
        ledger.lose = lambda _packet: False
        await until(lambda: (tx.outcome, confirmed.outcome) == (Outcome.COMMITTED, Outcome.COMMITTED))
        assert client.statistics().pending_decisions == 0
    assert ledger.committed == {tx.id, confirmed.id}


@both_loops
async def test_a_pending_commit_is_sent_again_after_a_reconnect() -> None:
    ledger = Ledger()

    async def drop(connection: Connection) -> None:
        await connection.accept()
        prepare = await connection.expect(Prepare)
        await connection.send(ledger.answered(prepare))
        await connection.expect(Decide)

    async with peer(drop, ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        async with client.transaction(message()) as tx:
            pass
        assert tx.outcome is Outcome.COMMITTED
        assert client.statistics().reconnects == 1
    assert ledger.committed == {tx.id}


@both_loops
async def test_another_broker_at_the_address_does_not_get_the_decision() -> None:
    ledger, other = Ledger("b1"), Ledger("b2")
    back = anyio.Event()

    async def drop(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await connection.send(ledger.answered(await connection.expect(Prepare)))
        await connection.expect(Decide)

    async def another(connection: Connection) -> None:
        await connection.accept(broker="b2")
        with anyio.move_on_after(0.08):
            await other.serve(connection)
        back.set()

    async with (
        peer(drop, another, ledger.script) as address,
        Client(address, group="g", topics=["trade"], timeout=1) as client,
    ):
        await transact(client, tx := client.transaction(message()))
        assert tx.outcome is Outcome.PENDING
        await back.wait()
        await until(lambda: tx.outcome is Outcome.COMMITTED)
    assert not other.packets(Decide)
    assert ledger.committed == {tx.id}


@both_loops
async def test_conflicts_and_unknown_transactions_leave_the_block_and_are_counted() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        with pytest.raises(TransactionConflict, match=r"rolled back before .* your local transaction stands"):
            async with client.transaction(message()) as tx:
                ledger.decided[tx.id] = DECISION_ROLLBACK
        assert tx.outcome is Outcome.ROLLED_BACK
        async with client.transaction(message()) as tx:
            ledger.decided[tx.id] = DECISION_COMMIT
            with pytest.raises(TransactionConflict, match="committed before"):
                await tx.rollback()
            assert tx.outcome is Outcome.COMMITTED
            with pytest.raises(TransactionConflict, match="committed before"):
                await tx.rollback()
        with pytest.raises(UnknownTransaction):
            async with client.transaction(message()) as tx:
                del ledger.open[tx.id]
        assert tx.outcome is Outcome.UNKNOWN
        statistics = client.statistics()
        assert (statistics.conflicts, statistics.unknown_transactions) == (2, 1)
        assert not client._transactions._halves


@both_loops
async def test_temporary_refusals_are_tried_again() -> None:
    ledger = Ledger()
    refused = 0

    def refuse(packet: Packet) -> tuple[str, bool] | None:
        nonlocal refused
        if is_decide(packet) and refused < 2:
            refused += 1
            return "store_full", True
        return None

    ledger.refuse = refuse
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        async with client.transaction(message()) as tx:
            pass
        assert tx.outcome is Outcome.COMMITTED
        assert refused == 2


@both_loops
async def test_a_decision_that_is_refused_for_long_is_pending_and_one_refused_for_good_is_raised() -> None:
    ledger = Ledger()
    ledger.refuse = lambda packet: ("draining", True) if is_decide(packet) else None
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], timeout=1) as client,
    ):
        await transact(client, pending := client.transaction(message()))
        assert pending.outcome is Outcome.PENDING
        ledger.refuse = lambda packet: ("no_such_thing", False) if is_decide(packet) else None
        with pytest.raises(Refused, match="no_such_thing"):
            async with client.transaction(message()) as tx:
                pass
        assert tx.outcome is Outcome.UNKNOWN
        await until(lambda: pending.outcome is Outcome.UNKNOWN)


@both_loops
async def test_each_decision_of_a_packet_has_its_own_answer() -> None:
    ledger = Ledger()
    begun = anyio.Event()
    outcomes: dict[bytes, str] = {}
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:

        async def transact() -> None:
            tx = client.transaction(message())
            try:
                async with tx:
                    await begun.wait()
            except TransactionConflict:
                outcomes[tx.id] = "conflict"
            else:
                outcomes[tx.id] = "well"

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(transact)
            await until(lambda: len(ledger.open) == 5)
            odd = list(ledger.open)[2]
            ledger.decided[odd] = DECISION_ROLLBACK
            begun.set()
    assert len(ledger.packets(Decide)) == 1
    assert {key for key, outcome in outcomes.items() if outcome == "conflict"} == {odd}
    assert len(ledger.committed) == 4


@both_loops
async def test_leaving_the_client_waits_for_decisions_but_not_for_ever() -> None:
    ledger = Ledger()
    ledger.lose = is_decide
    async with peer(ledger.script) as address:
        client = Client(address, group="g", topics=["trade"], timeout=0.5)
        with warnings() as texts:
            async with client:
                await transact(client, client.transaction(message()))
        assert any("1 decisions were not answered" in text and "will ask" in text for text in texts)
        async with Client(address, group="g", topics=["trade"], timeout=1) as client:
            await transact(client, tx := client.transaction(message()))
            assert tx.outcome is Outcome.PENDING
            ledger.lose = lambda _packet: False
        assert ledger.committed >= {tx.id}
        assert client.statistics().committed == 1


@both_loops
async def test_a_block_left_after_its_client_says_that_the_local_transaction_stands() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address:
        async with Client(address, group="g", topics=["trade"]) as client:
            tx = await client.transaction(message()).__aenter__()
            failed = await client.transaction(message()).__aenter__()
        with pytest.raises(ClientClosed, match="your local transaction stands"):
            await tx.__aexit__(None, None, None)
        assert tx.outcome is Outcome.UNKNOWN
        await failed.__aexit__(OwnError, OwnError(), None)
        assert failed.outcome is Outcome.UNKNOWN
    assert not ledger.decided


@both_loops
async def test_being_cancelled_while_the_commit_is_answered_changes_nothing_about_it() -> None:
    ledger = Ledger()
    ledger.lose = is_decide
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], timeout=1) as client,
    ):
        tx = client.transaction(message())
        with anyio.CancelScope() as scope:
            async with tx:
                scope.cancel()
            raise AssertionError
        assert scope.cancelled_caught
        assert tx.outcome is Outcome.PENDING
        ledger.lose = lambda _packet: False
        with hurried(client):
            await until(lambda: tx.outcome is Outcome.COMMITTED)
        assert not client._transactions._deciding


@both_loops
async def test_an_answer_about_others_ends_the_connection_and_the_decision_is_sent_again() -> None:
    ledger = Ledger()

    async def wrong(connection: Connection) -> None:
        await connection.accept()
        await connection.send(ledger.answered(await connection.expect(Prepare)))
        decide = await connection.expect(Decide)
        await connection.send(Decided(decide.request, [[1, "no", "no", False]]))
        refusal = await connection.expect(Refusal)
        assert "speaks of others" in refusal.reason

    async with peer(wrong, ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        async with client.transaction(message()) as tx:
            pass
        assert tx.outcome is Outcome.COMMITTED


@both_loops
async def test_after_a_failure_of_the_client_leaving_raises_it_and_decides_nothing() -> None:
    ledger = Ledger()

    async def fail() -> None:
        raise OwnError("behind the scenes")

    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"], timeout=1) as client:
        tx = await client.transaction(message()).__aenter__()
        waiting = await client.transaction(message()).__aenter__()
        ledger.lose = is_decide
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waiting.__aexit__, None, None, None)
            await until(lambda: ledger.committed)
            await client._guarded(fail)
        assert waiting.outcome.value == "pending"
        with pytest.raises(OwnError):
            await tx.__aexit__(None, None, None)
        assert tx.outcome is Outcome.UNKNOWN
        ledger.lose = lambda _packet: False
        with hurried(client):
            await until(lambda: waiting.outcome is Outcome.COMMITTED)
    assert ledger.committed == {waiting.id}
