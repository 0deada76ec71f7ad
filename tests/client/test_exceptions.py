"""Leaving a transaction by an exception: it passes through, and the check function is asked at once."""

from __future__ import annotations

from contextlib import ExitStack

import anyio
import pytest

from kiteq.remoting.packets import (
    DECISION_COMMIT,
    DECISION_ROLLBACK,
    Decide,
)
from kiteq_client import Client, Decision, Outcome, Received
from tests.client.ledger import Ledger, hurried, until, warnings
from tests.client.parts import OwnError, answering, message
from tests.client.peer import both_loops, peer


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("answer", "outcome", "decided"),
    [
        (Decision.COMMIT, Outcome.COMMITTED, DECISION_COMMIT),
        (Decision.ROLLBACK, Outcome.ROLLED_BACK, DECISION_ROLLBACK),
        (Decision.UNKNOWN, Outcome.UNKNOWN, None),
        (Decision.RUNNING, Outcome.UNKNOWN, None),
    ],
)
def test_after_an_exception_the_check_function_is_asked_at_once_and_decides(
    loop: str, answer: Decision, outcome: Outcome, decided: int | None
) -> None:
    async def main() -> None:
        ledger = Ledger()
        async with (
            peer(ledger.script) as address,
            Client(address, group="g", topics=["trade"], on_check=answering(answer)) as client,
        ):
            error = OwnError("after the commit")
            with pytest.raises(OwnError) as caught:
                async with client.transaction(message()) as tx:
                    raise error
            assert caught.value is error
            assert (error.__context__, error.__cause__) == (None, None)
            assert tx.outcome is outcome
            assert ledger.decided == ({} if decided is None else {tx.id: decided})
            assert not ledger.answers
            assert not client._transactions._halves

    anyio.run(main, backend=loop)


@both_loops
async def test_an_exception_without_a_check_function_decides_nothing() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        with pytest.raises(OwnError):
            async with client.transaction(message()) as tx:
                raise OwnError
        assert tx.outcome is Outcome.UNKNOWN
        assert not ledger.packets(Decide)
        await tx.rollback()
        assert ledger.rolled_back == {tx.id}


@both_loops
async def test_an_exception_in_a_deferred_transaction_asks_nothing_at_once() -> None:
    ledger = Ledger()
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=answering(Decision.ROLLBACK)) as client,
    ):
        with pytest.raises(OwnError):
            async with client.transaction(message()) as tx:
                tx.defer()
                raise OwnError
        assert tx.outcome.value == "unknown"
        assert not ledger.packets(Decide)
        await tx.commit()
        assert tx.outcome.value == "committed"


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), GeneratorExit()])
def test_what_is_no_exception_asks_nothing_and_passes_through(loop: str, error: BaseException) -> None:
    async def main() -> None:
        ledger = Ledger()
        async with (
            peer(ledger.script) as address,
            Client(address, group="g", topics=["trade"], on_check=answering(Decision.COMMIT)) as client,
        ):
            tx = client.transaction(message())
            with pytest.raises(type(error)) as caught:
                async with tx:
                    raise error
            assert caught.value is error
            assert tx.outcome is Outcome.UNKNOWN
            assert not ledger.packets(Decide)

    anyio.run(main, backend=loop)


@both_loops
async def test_cancellation_asks_nothing_and_is_no_group() -> None:
    ledger = Ledger()
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=answering(Decision.COMMIT)) as client,
    ):
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.02):
                async with client.transaction(message()) as tx:
                    await anyio.sleep_forever()
        assert tx.outcome is Outcome.UNKNOWN
        assert not ledger.packets(Decide)


@both_loops
async def test_a_check_that_fails_or_hangs_does_not_replace_the_exception() -> None:
    ledger = Ledger()
    calls = 0

    async def check(_received: Received) -> Decision:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ZeroDivisionError
        await anyio.sleep_forever()
        raise AssertionError

    hurry = ExitStack()
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=check, timeout=1) as client,
    ):
        for _ in range(2):
            tx = client.transaction(message())
            with pytest.raises(OwnError) as caught:
                async with tx:
                    hurry.enter_context(hurried(client))
                    raise OwnError
            hurry.close()
            assert caught.value.__context__ is None
            assert tx.outcome is Outcome.UNKNOWN
    assert calls == 2


@both_loops
async def test_the_question_at_once_does_not_wait_for_other_checks() -> None:
    ledger = Ledger()
    release = anyio.Event()
    running = 0

    async def check(_received: Received) -> Decision:
        nonlocal running
        running += 1
        await release.wait()
        return Decision.COMMIT

    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=check, timeout=1) as client,
    ):
        others = [(await client.prepare(message())).id for _ in range(17)]
        await ledger.ask(*others)
        await until(lambda: running == 16)
        tx = client.transaction(message())
        with ExitStack() as hurry, pytest.raises(OwnError):
            async with tx:
                hurry.enter_context(hurried(client))
                raise OwnError
        assert tx.outcome is Outcome.UNKNOWN
        release.set()
        await until(lambda: ledger.committed == {tx.id, *others})
        assert client.statistics().checks["commit"] == 17


@both_loops
async def test_the_question_at_once_is_not_cut_short_by_a_cancellation() -> None:
    ledger = Ledger()
    asked = anyio.Event()

    async def check(_received: Received) -> Decision:
        asked.set()
        await anyio.sleep(0.02)
        return Decision.COMMIT

    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=check) as client,
        anyio.create_task_group() as tasks,
    ):
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                await asked.wait()
                scope.cancel()

            tasks.start_soon(cancel)
            with pytest.raises(OwnError):
                async with client.transaction(message()) as tx:
                    raise OwnError
        assert tx.outcome is Outcome.COMMITTED
    assert ledger.committed == {tx.id}


@both_loops
async def test_what_the_check_says_at_once_can_be_refused_without_replacing_the_exception() -> None:
    ledger = Ledger()
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=answering(Decision.COMMIT)) as client,
    ):
        with warnings() as texts, pytest.raises(OwnError):
            async with client.transaction(message()) as tx:
                ledger.decided[tx.id] = DECISION_ROLLBACK
                raise OwnError
        assert tx.outcome is Outcome.ROLLED_BACK
        assert any("decided the other way" in text for text in texts)
