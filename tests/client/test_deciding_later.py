"""Decisions beside the plain way: hooks, deferred ones, by id, and who hears of them."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from kiteq.remoting.packets import DECISION_ROLLBACK
from kiteq_client import (
    Client,
    ClientClosed,
    Decision,
    DecisionPending,
    NotConnected,
    Outcome,
    Prepared,
    Received,
    Transaction,
    TransactionConflict,
    UnknownTransaction,
)
from tests.client.ledger import Ledger, everything, hurried, until, warnings
from tests.client.parts import OwnError, is_decide, message
from tests.client.peer import both_loops, peer


@both_loops
async def test_hooks_run_before_the_decision_and_can_prevent_it() -> None:
    ledger = Ledger()
    order: list[str] = []

    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:

        async def second() -> None:
            await checkpoint()
            order.append(f"second, {len(ledger.committed)} committed")

        def fail() -> None:
            raise OwnError("the connection is inside a transaction")

        async with client.transaction(message()) as tx:
            tx.on_leave(lambda: order.append("first"))
            tx.on_leave(second)
        assert order == ["first", "second, 0 committed"]
        assert ledger.committed == {tx.id}
        with pytest.raises(OwnError):
            async with client.transaction(message()) as kept:
                kept.on_leave(fail)
        assert kept.outcome is Outcome.UNKNOWN
        async with client.transaction(message()) as tx:
            tx.on_leave(fail)
            await tx.rollback()
        with pytest.raises(ZeroDivisionError):
            async with client.transaction(message()) as tx:
                tx.on_leave(fail)
                raise ZeroDivisionError
        async with client.transaction(message()) as tx:
            tx.on_leave(tx.rollback)
            tx.on_leave(fail)
        assert tx.outcome is Outcome.ROLLED_BACK
        assert kept.id in ledger.open


@both_loops
async def test_a_deferred_transaction_is_decided_later() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:

        async def deferred() -> Transaction:
            async with client.transaction(message()) as tx:
                with pytest.raises(RuntimeError, match="after defer"):
                    await tx.commit()
                tx.on_leave(tx.defer)
            assert tx.outcome is Outcome.OPEN
            return tx

        one, two, three = await deferred(), await deferred(), await deferred()
        await one.commit()
        await one.commit()
        await two.rollback()
        three.abandon()
        assert [tx.outcome.value for tx in (one, two, three)] == ["committed", "rolled back", "unknown"]
        with pytest.raises(RuntimeError, match="already"):
            await two.commit()
        for tx in (one, two):
            tx.abandon()
            with pytest.raises(RuntimeError, match="deferred"):
                tx.defer()
        assert (ledger.committed, ledger.rolled_back, set(ledger.open)) == ({one.id}, {two.id}, {three.id})
        with pytest.raises(OwnError):
            async with client.transaction(message()) as four:
                four.defer()
                raise OwnError
        assert four.outcome == "unknown"
        await four.commit()
        assert four.outcome == "committed"


@both_loops
async def test_transactions_without_a_block_are_decided_by_what_names_them() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        one, two, three = [await client.prepare(message(), message(), check_after=3) for _ in range(3)]
        assert (one.broker, one.handle) == ("b1", 100)
        await client.commit(one)
        await client.commit(one.id)
        await client.rollback(two.id.hex())
        with pytest.raises(TransactionConflict, match="rolled back before"):
            await client.commit(two)
        await client.commit(Prepared(three.id, "elsewhere", 7))
        with pytest.raises(UnknownTransaction):
            await client.rollback(bytes(16))
        for wrong in ("", b"", "x" * 32, 5):
            with pytest.raises(ValueError):
                await client.commit(wrong)  # type: ignore[arg-type]
        assert (ledger.committed, ledger.rolled_back) == ({one.id, three.id}, {two.id})
        statistics = client.statistics()
        assert (statistics.conflicts, statistics.unknown_transactions) == (1, 1)
        assert not client._transactions._halves
    with pytest.raises(ClientClosed):
        await client.commit(one)


@both_loops
async def test_a_decision_by_id_without_an_answer_is_raised_as_pending() -> None:
    ledger = Ledger()
    ledger.lose = is_decide
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], timeout=1) as client,
    ):
        prepared = await client.prepare(message())
        with hurried(client), pytest.raises(DecisionPending, match="your local transaction stands"):
            await client.commit(prepared)
        ledger.lose = lambda _packet: False
    assert ledger.committed == {prepared.id}
    assert client.statistics().committed == 1


@both_loops
async def test_an_id_alone_is_asked_for_at_every_broker() -> None:
    ledgers = [Ledger("b1"), Ledger("b2")]
    async with (
        peer(ledgers[0].script) as one,
        peer(ledgers[1].script) as two,
        Client(f"kiteq://{one},{two}", group="g", topics=["trade"]) as client,
    ):
        keys = [(await client.prepare(message())).id for _ in range(6)]
        for key in keys:
            await client.commit(key)
        with pytest.raises(UnknownTransaction):
            await client.commit(bytes(16))
        assert client.statistics().unknown_transactions == 1
        assert ledgers[0].committed | ledgers[1].committed == set(keys)
    async with (
        peer(ledgers[0].script) as one,
        Client(f"kiteq://{one},127.0.0.1:1", group="g", topics=["trade"]) as client,
    ):
        with pytest.raises(NotConnected, match=r"127\.0\.0\.1:1"):
            await client.commit(bytes(16))
    async with Client("127.0.0.1:1,127.0.0.1:2", group="g", wait=False) as client:
        with pytest.raises(NotConnected):
            await client.commit(bytes(16))


@both_loops
async def test_a_checker_hears_of_every_decision_on_disk() -> None:
    heard: list[tuple[bytes, Decision]] = []

    class Checker:
        async def check(self, received: Received) -> Decision:
            return Decision.UNKNOWN

        async def decided(self, transaction_id: bytes, decision: Decision) -> None:
            await anyio.sleep(0.01)
            heard.append((transaction_id, decision))
            if len(heard) == 1:
                raise OwnError("the table is locked")

    ledger = Ledger()
    async with peer(ledger.script) as address:
        with warnings() as texts:
            async with Client(address, group="g", topics=["trade"], on_check=Checker()) as client:
                async with client.transaction(message()) as one:
                    pass
                async with client.transaction(message()) as two:
                    await two.rollback()
                with pytest.raises(TransactionConflict):
                    async with client.transaction(message()) as three:
                        ledger.decided[three.id] = DECISION_ROLLBACK
                four = await client.prepare(message())
                await client.commit(four)
        assert heard == [
            (one.id, Decision.COMMIT),
            (two.id, Decision.ROLLBACK),
            (four.id, Decision.COMMIT),
        ]
        assert ["failed to note" in text for text in texts] == [True]


@both_loops
async def test_a_broker_that_does_not_answer_keeps_no_decision_from_the_one_that_knows_it() -> None:
    ledgers = [Ledger("b1"), Ledger("b2")]
    async with (
        peer(ledgers[0].script) as one,
        peer(ledgers[1].script) as two,
        Client(f"kiteq://{one},{two}", group="g", topics=["trade"]) as client,
    ):
        await until(lambda: len(client._brokers.sessions()) == 2)
        prepared = [await client.prepare(message()) for _ in range(2)]
        first, second = client._brokers.all
        [still] = [ledger for ledger in ledgers if ledger.broker == first.name]
        [known] = [one for one in prepared if one.broker == second.name]
        still.lose = everything
        with hurried(client):
            await client.commit(known.id)
            assert client.statistics().pending_decisions == 0
            [lost] = [one for one in prepared if one.broker == first.name]
            with pytest.raises(DecisionPending):
                await client.commit(lost.id)
        still.lose = lambda _packet: False
