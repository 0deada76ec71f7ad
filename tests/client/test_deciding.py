"""Leaving a transaction: what became of it, and what the client does when the broker does not say."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from kiteq.remoting.packets import DECISION_COMMIT, DECISION_ROLLBACK, Decide, Decided, Packet, Prepare, Refusal
from kiteq_client import (
    Client,
    ClientClosed,
    Decision,
    DecisionPending,
    Message,
    NotConnected,
    Outcome,
    Prepared,
    Received,
    Refused,
    Transaction,
    TransactionConflict,
    UnknownTransaction,
)
from tests.client.ledger import Ledger, until, warnings
from tests.client.peer import Connection, both_loops, peer


class OwnError(Exception):
    pass


def message() -> Message:
    return Message("trade", "pay", b"x")


def is_decide(packet: Packet) -> bool:
    return isinstance(packet, Decide)


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
        Client(address, group="g", topics=["trade"], timeout=0.05) as client,
    ):
        with warnings() as texts:
            async with client.transaction(message()) as tx:
                pass
        assert tx.outcome is Outcome.PENDING
        assert client.statistics().pending_decisions == 1
        assert ["your local transaction stands" in text for text in texts] == [True]
        with pytest.raises(RuntimeError, match="pending"):
            await tx.rollback()
        with pytest.raises(DecisionPending, match="your local transaction stands"):
            async with client.transaction(message(), confirm=True) as confirmed:
                pass
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
        Client(address, group="g", topics=["trade"], timeout=0.05) as client,
    ):
        async with client.transaction(message()) as tx:
            pass
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
        Client(address, group="g", topics=["trade"], timeout=0.05) as client,
    ):
        async with client.transaction(message()) as pending:
            pass
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
        client = Client(address, group="g", topics=["trade"], timeout=0.05)
        with warnings() as texts:
            async with client, client.transaction(message()):
                pass
        assert any("1 decisions were not answered" in text and "will ask" in text for text in texts)
        async with Client(address, group="g", topics=["trade"], timeout=0.05) as client:
            async with client.transaction(message()) as tx:
                pass
            ledger.lose = lambda _packet: False
        assert tx.outcome is Outcome.COMMITTED


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
        Client(address, group="g", topics=["trade"], timeout=0.2) as client,
    ):
        tx = client.transaction(message())
        with anyio.CancelScope() as scope:
            async with tx:
                scope.cancel()
            raise AssertionError
        assert scope.cancelled_caught
        assert tx.outcome is Outcome.PENDING
        ledger.lose = lambda _packet: False
        await until(lambda: tx.outcome is Outcome.COMMITTED)
        assert not client._transactions._deciding


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
        Client(address, group="g", topics=["trade"], timeout=0.05) as client,
    ):
        prepared = await client.prepare(message())
        with pytest.raises(DecisionPending, match="your local transaction stands"):
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
async def test_a_checker_hears_of_every_decision_on_disk() -> None:
    heard: list[tuple[bytes, Decision]] = []

    class Checker:
        async def check(self, received: Received) -> Decision:
            return Decision.UNKNOWN

        async def decided(self, transaction_id: bytes, decision: Decision) -> None:
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
