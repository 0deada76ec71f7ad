"""A transaction cancelled at every point where it can be."""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from kiteq.remoting.packets import Decide, Enlist, Packet, Prepare
from kiteq_client import Client, Decision, Message, Outcome, Received, SendTimeout
from tests.client.ledger import Ledger, hurried, until
from tests.client.peer import peer


@types.coroutine
def cancelled_at(step: int, work: Coroutine[Any, Any, None], scope: anyio.CancelScope) -> Generator[Any, Any, int]:
    """Run a coroutine and cancel the scope around it when it waits for the n-th time; return how often it waited."""
    waits = 0
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            trap = work.send(value) if error is None else work.throw(error)
        except StopIteration:
            return waits
        waits += 1
        if waits == step:
            scope.cancel()
        value = error = None
        try:
            value = yield trap
        except BaseException as raised:  # noqa: BLE001 it goes on into the coroutine
            error = raised


class Progress:
    """How far a block got."""

    def __init__(self) -> None:
        self.entered = self.done = self.added = False


async def nothing_is_left(client: Client, unanswered: int = 0) -> None:
    transactions = client._transactions
    assert not transactions.placing.is_waiting
    assert not transactions._deciding
    assert not transactions._asking
    await until(lambda: not transactions._halves and not transactions._abandoned and not transactions.pending)
    await until(lambda: client.statistics().in_flight <= unanswered)
    assert not client._producer.outgoing._wanted


async def block(client: Client, sent: Message, progress: Progress) -> None:
    async with client.transaction(sent, Message("trade", "pay")) as tx:
        progress.entered = True
        await tx.add(Message("trade", "pay"))
        progress.added = True
        tx.on_leave(checkpoint)
        await checkpoint()
        progress.done = True


async def rolled_back_block(client: Client, sent: Message, progress: Progress) -> None:
    async with client.transaction(sent) as tx:
        progress.entered = True
        await tx.rollback()
        progress.done = True


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("lost", [None, Prepare, Enlist, Decide])
def test_a_block_cancelled_anywhere_is_delivered_only_after_its_body(loop: str, lost: type[Packet] | None) -> None:
    """Whichever first answer is lost."""

    async def once(step: int) -> bool:
        """Cancel at this step; return whether it got that far."""
        ledger, progress, sent = Ledger(), Progress(), Message("trade", "pay")
        if lost is not None:
            ledger.lose = lambda packet: isinstance(packet, lost) and len(ledger.packets(lost)) == 1
        async with (
            peer(ledger.script) as address,
            Client(address, group="g", topics=["trade"], timeout=1) as client,
        ):
            waits = 1_000
            with hurried(client, 1 if lost is None else 0.05), anyio.CancelScope() as scope:
                try:
                    waits = await cancelled_at(step, block(client, sent, progress), scope)
                except SendTimeout:
                    assert lost is not None
                    waits = 0
            await checkpoint()
            if not progress.entered:
                if ledger.packets(Prepare):
                    await until(lambda: sent.id in ledger.rolled_back)
                assert not ledger.committed
            elif progress.done and not (scope.cancelled_caught and not client._transactions.pending):
                await until(lambda: sent.id in ledger.committed)
            # A connection that lives owes an answer, and keeps its room until it gives it or ends.
            await nothing_is_left(client, {Prepare: 2, Enlist: 1}.get(lost, 0))  # type: ignore[arg-type]
            if progress.entered and not progress.done:
                assert sent.id in ledger.open
                assert not ledger.decided
            return waits >= step

    async def sweep() -> None:
        with anyio.fail_after(30):
            step = 1
            while await once(step):
                step += 1
            assert step > (1 if lost is Prepare else 2)

    anyio.run(sweep, backend=loop)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_a_rollback_cancelled_anywhere_is_never_delivered(loop: str) -> None:
    async def once(step: int) -> bool:
        ledger, progress, sent = Ledger(), Progress(), Message("trade", "pay")
        async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
            waits = 1_000
            with anyio.CancelScope() as scope:
                waits = await cancelled_at(step, rolled_back_block(client, sent, progress), scope)
            await nothing_is_left(client)
            if ledger.packets(Prepare):
                assert ledger.rolled_back == {sent.id}
            assert not ledger.committed
            return waits >= step

    async def sweep() -> None:
        with anyio.fail_after(20):
            step = 1
            while await once(step):
                step += 1
            assert step > 2

    anyio.run(sweep, backend=loop)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_the_question_at_once_cancelled_anywhere_lets_the_exception_through(loop: str) -> None:
    async def check(_received: Received) -> Decision:
        await checkpoint()
        return Decision.COMMIT

    async def once(step: int) -> bool:
        ledger, sent = Ledger(), Message("trade", "pay")
        async with (
            peer(ledger.script) as address,
            Client(address, group="g", topics=["trade"], on_check=check) as client,
        ):
            tx = client.transaction(sent)
            raised = False

            async def fail() -> None:
                nonlocal raised
                try:
                    async with tx:
                        raise ZeroDivisionError
                except ZeroDivisionError:
                    raised = True

            waits = 1_000
            with anyio.CancelScope() as scope:
                waits = await cancelled_at(step, fail(), scope)
            if tx._half is not None:
                assert raised
                assert tx.outcome is Outcome.COMMITTED
                assert ledger.committed == {sent.id}
            else:
                assert scope.cancelled_caught
            await nothing_is_left(client)
            return waits >= step

    async def sweep() -> None:
        with anyio.fail_after(20):
            step = 1
            while await once(step):
                step += 1
            assert step > 2

    anyio.run(sweep, backend=loop)
