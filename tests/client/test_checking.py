"""Answering the broker's checks, and asking the check function at once after an exception."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from kiteq.remoting.packets import (
    DECISION_RUNNING,
    DECISION_UNKNOWN,
    Ask,
    Credit,
    Decide,
    Packet,
    Refusal,
)
from kiteq_client import Checker, Client, Decision, Handlers, Outcome, Received
from tests.client.ledger import Ledger, transact, until, warnings
from tests.client.parts import OwnError, answering, is_decide, message
from tests.client.peer import Connection, both_loops, peer


@both_loops
async def test_while_a_block_is_open_or_deferred_the_client_answers_running_itself() -> None:
    ledger = Ledger()
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=answering(Decision.COMMIT)) as client,
    ):
        async with client.transaction(message()) as tx:
            await ledger.ask(tx.id)
            await until(lambda: ledger.answers == [(tx.id, DECISION_RUNNING)])
            tx.defer()
        await ledger.ask(tx.id)
        await until(lambda: ledger.answers == 2 * [(tx.id, DECISION_RUNNING)])
        tx.abandon()
        await ledger.ask(tx.id)
        await until(lambda: ledger.committed == {tx.id})
        counted = {"running": 2, "commit": 1, "rollback": 0, "unknown": 0}
        await until(lambda: client.statistics().checks == counted)


@both_loops
async def test_a_transaction_that_is_forgotten_is_not_running_for_ever() -> None:
    ledger = Ledger()
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=answering(Decision.ROLLBACK)) as client,
    ):
        async with client.transaction(message()) as tx:
            tx.defer()
        key = tx.id
        del tx
        gc.collect()
        await ledger.ask(key)
        await until(lambda: ledger.rolled_back == {key})


@both_loops
async def test_a_check_gets_the_first_message_and_which_attempt_it_is() -> None:
    ledger = Ledger()
    asked: list[tuple[bytes, bytes, int, str]] = []

    async def check(received: Received) -> Decision:
        asked.append((received.id, received.body, received.attempt, received.group))
        return Decision.ROLLBACK

    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=check) as client,
    ):
        prepared = await client.prepare(message(b"first"), message(b"second"))
        await ledger.ask(prepared.id, attempt=3)
        await until(lambda: ledger.rolled_back == {prepared.id})
    assert asked == [(prepared.id, b"first", 3, "g")]


@both_loops
async def test_many_checks_run_a_few_at_a_time_and_are_answered_in_few_packets() -> None:
    ledger = Ledger()
    running = most = 0
    release = anyio.Event()

    async def check(received: Received) -> Decision:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1
        return Decision.COMMIT if received.body == b"even" else Decision.UNKNOWN

    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=check) as client,
    ):
        keys = [(await client.prepare(message(b"odd" if number % 2 else b"even"))).id for number in range(64)]
        before = len(ledger.packets(Decide))
        for _ in range(2):
            await ledger.ask(*keys)
        await until(lambda: running == 16)
        release.set()
        await until(lambda: len(ledger.committed) + len(ledger.answers) == 64)
        assert len(ledger.packets(Decide)) - before <= 16
    assert most == 16
    assert ledger.committed == set(keys[::2])
    assert sorted(ledger.answers) == sorted((key, DECISION_UNKNOWN) for key in keys[1::2])


@both_loops
async def test_whatever_goes_wrong_in_a_check_function_is_unknown_and_named() -> None:
    ledger = Ledger()
    faults: dict[bytes, Callable[[], Any]] = {}

    async def check(received: Received) -> Decision:
        return faults[received.body]()  # type: ignore[no-any-return]

    def failing(error: BaseException) -> Callable[[], Any]:
        def fail() -> Any:
            raise error

        return fail

    faults[b"error"] = failing(OwnError("no database"))
    faults[b"exit"] = failing(SystemExit(2))
    faults[b"interrupt"] = failing(KeyboardInterrupt())
    faults[b"nothing"] = lambda: None
    faults[b"truth"] = lambda: True
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=check) as client,
    ):
        with warnings() as texts:
            for body in faults:
                prepared = await client.prepare(message(body))
                await ledger.ask(prepared.id)
                await until(lambda wanted=prepared.id: ledger.answers and ledger.answers[-1][0] == wanted)  # type: ignore[misc]
        assert {answer for _, answer in ledger.answers} == {DECISION_UNKNOWN}
        assert client.statistics().checks["unknown"] == 5
    for text, words in zip(
        texts,
        ["OwnError: no database", "SystemExit: 2", "KeyboardInterrupt", "returned None", "returned True"],
        strict=True,
    ):
        assert words in text


@both_loops
async def test_a_check_function_that_hangs_is_cancelled() -> None:
    ledger = Ledger()

    async def check(_received: Received) -> Decision:
        await anyio.sleep_forever()
        raise AssertionError

    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], on_check=check, handler_timeout=0.02) as client,
    ):
        prepared = await client.prepare(message())
        with warnings() as texts:
            await ledger.ask(prepared.id)
            await until(lambda: ledger.answers == [(prepared.id, DECISION_UNKNOWN)])
        assert ["did not answer within 0.02 s" in text for text in texts] == [True]


def test_a_check_function_that_meets_a_cancelled_task_of_its_own_is_unknown() -> None:
    ledger = Ledger()

    async def check(_received: Received) -> Decision:
        task = asyncio.ensure_future(asyncio.sleep(10))
        task.cancel()
        await task
        raise AssertionError

    async def main() -> None:
        async with (
            peer(ledger.script) as address,
            Client(address, group="g", topics=["trade"], on_check=check) as client,
        ):
            prepared = await client.prepare(message())
            for count in (1, 2):
                await ledger.ask(prepared.id)
                await until(lambda wanted=count: len(ledger.answers) == wanted)  # type: ignore[misc]

    anyio.run(main, backend="asyncio")
    assert {answer for _, answer in ledger.answers} == {DECISION_UNKNOWN}


@both_loops
async def test_without_a_check_function_the_answer_is_unknown_with_one_warning() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        one, two = (await client.prepare(message()), await client.prepare(message()))
        with warnings() as texts:
            await ledger.ask(one.id, two.id)
            await ledger.ask(one.id)
            await until(lambda: len(ledger.answers) == 3)
        assert ["no check function" in text for text in texts] == [True]
        assert len(ledger.packets(Decide)) <= 2
        assert client.statistics().checks["unknown"] == 3


@both_loops
async def test_a_pending_decision_is_sent_again_when_the_broker_asks() -> None:
    ledger = Ledger()
    lost: list[Packet] = []

    def lose_one(packet: Packet) -> bool:
        if is_decide(packet) and not lost:
            lost.append(packet)
            return True
        return False

    async with peer(ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        prepared = await client.prepare(message())
        blobs = ledger.open[prepared.id]
        ledger.lose = lose_one
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.commit, prepared)
            await until(lambda: lost)
            # As if the packet itself had been lost.
            del ledger.decided[prepared.id]
            ledger.open[prepared.id] = blobs
            await ledger.ask(prepared.id)
        assert client.statistics().checks["commit"] == 1
    assert ledger.committed == {prepared.id}


@both_loops
async def test_a_decision_follows_its_broker_to_another_address() -> None:
    ledger = Ledger("b1")
    moved = anyio.Event()

    async def drop(connection: Connection) -> None:
        await connection.accept(broker="b1")
        await connection.send(ledger.answered(await connection.receive()))
        await connection.expect(Decide)
        moved.set()

    async def other(connection: Connection) -> None:
        await connection.accept(broker="b2")
        await Ledger("b2").serve(connection)

    async def late(connection: Connection) -> None:
        hello = await connection.receive()
        await moved.wait()
        connection._packets.append(hello)
        await ledger.script(connection)

    async with (
        peer(drop, other) as first,
        peer(late) as second,
        Client(f"kiteq://{first},{second}", group="g", topics=["trade"], wait=False, timeout=1) as client,
    ):
        await transact(client, tx := client.transaction(message()))
        await until(lambda: tx.outcome is Outcome.COMMITTED)
        assert client.statistics().checks["commit"] == 0


@both_loops
async def test_an_ask_that_does_not_fit_ends_the_connection() -> None:
    ledger = Ledger()

    async def wrong(connection: Connection) -> None:
        await connection.accept()
        await connection.send(Ask(0, [1, 2], [bytes(16)], [b"x"]))
        refusal = await connection.expect(Refusal)
        assert "one message and one attempt" in refusal.reason

    async with peer(wrong, ledger.script) as address, Client(address, group="g", topics=["trade"]) as client:
        async with client.transaction(message()) as tx:
            pass
        assert tx.outcome is Outcome.COMMITTED


@both_loops
async def test_the_check_function_may_stand_among_the_handlers_of_a_client_that_only_publishes() -> None:
    handlers = Handlers()

    @handlers.check
    async def was_it_committed(_received: Received) -> Decision:
        return Decision.COMMIT

    ledger = Ledger()
    async with (
        peer(ledger.script) as address,
        Client(address, group="g", topics=["trade"], handlers=handlers) as client,
    ):
        prepared = await client.prepare(message())
        await ledger.ask(prepared.id)
        await until(lambda: ledger.committed)
        with anyio.move_on_after(0.01) as scope:
            await client.run()
        assert scope.cancelled_caught
    assert not ledger.packets(Credit)


def test_there_is_one_check_function_and_it_is_async() -> None:
    handlers = Handlers()

    class Half:
        async def check(self, _received: Received) -> Decision:
            return Decision.UNKNOWN

    class Plain(Half):
        def decided(self, transaction_id: bytes, decision: Decision) -> None: ...

    class Whole(Half):
        async def decided(self, transaction_id: bytes, decision: Decision) -> None: ...

    for wrong in (len, Half(), Plain(), Whole, 5):
        with pytest.raises(TypeError, match="async def"):
            Client("localhost:1", group="g", on_check=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="async def"):
            handlers.check(wrong)  # type: ignore[type-var]
    checker: Checker = Whole()
    assert handlers.check(checker) is checker
    with pytest.raises(ValueError, match="already"):
        handlers.check(answering())
    with pytest.raises(ValueError, match="not both"):
        Client("localhost:1", group="g", handlers=handlers, on_check=answering())


@both_loops
async def test_a_check_function_without_topics_is_warned_of() -> None:
    ledger = Ledger()
    async with peer(ledger.script) as address:
        with warnings() as texts:
            async with Client(address, group="g", on_check=answering()):
                pass
        assert ["topics= is empty" in text for text in texts] == [True]


@both_loops
async def test_checks_that_run_when_the_client_is_left_are_not_answered() -> None:
    ledger = Ledger()
    asked = anyio.Event()

    async def check(_received: Received) -> Decision:
        asked.set()
        await anyio.sleep_forever()
        raise AssertionError

    async with peer(ledger.script) as address:
        async with Client(address, group="g", topics=["trade"], on_check=check) as client:
            prepared = await client.prepare(message())
            await ledger.ask(prepared.id)
            await asked.wait()
        await until(lambda: not ledger.connections)
    assert not ledger.answers
