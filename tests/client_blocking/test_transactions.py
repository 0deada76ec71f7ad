"""Transactions without `async`: what is delivered, what is not, and who is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from kiteq_client import (
    Decision,
    Message,
    Outcome,
    Received,
    TransactionConflict,
    UnknownTransaction,
)
from kiteq_client.blocking import Client, Handlers
from tests.client_blocking.parts import Checks, OwnError, Place, Running, opened, texts, until


def test_leaving_commits_all_messages(place: Place) -> None:
    with opened(place) as client:
        transaction = client.transaction(place.message("one"), place.message("two"))
        outcomes = [transaction.outcome]
        with transaction as tx:
            assert tx is transaction
            assert len(tx.id) == 16
            tx.add(place.message("three"))
            assert texts(client, place) == []
            outcomes.append(tx.outcome)
        assert outcomes == [Outcome.OPEN, Outcome.OPEN]
        assert tx.outcome is Outcome.COMMITTED
        assert repr(tx) == f"Transaction({tx.id.hex()}, committed)"
        assert texts(client, place) == ["one", "two", "three"]
        assert client.statistics().committed == 1
        with pytest.raises(RuntimeError, match="entered once"), tx:
            pytest.fail("entered again")


def test_a_rollback_delivers_nothing(place: Place) -> None:
    with opened(place) as client:
        with client.transaction(place.message("gone"), confirm=True) as tx:
            tx.rollback()
            assert tx.outcome is Outcome.ROLLED_BACK
            with pytest.raises(RuntimeError, match="nothing can be added"):
                tx.add(place.message("late"))
        assert tx.outcome is Outcome.ROLLED_BACK
        assert texts(client, place) == []


@pytest.mark.parametrize(
    ("answer", "outcome", "delivered"),
    [
        (Decision.COMMIT, Outcome.COMMITTED, ["half"]),
        (Decision.ROLLBACK, Outcome.ROLLED_BACK, []),
        (Decision.UNKNOWN, Outcome.UNKNOWN, []),
    ],
)
def test_an_exception_passes_unchanged_and_the_check_decides(
    place: Place, answer: Decision, outcome: Outcome, delivered: list[str]
) -> None:
    checks = Checks(answer)
    error = OwnError("after the database commit")
    with opened(place, on_check=checks) as client:
        with pytest.raises(OwnError) as caught, client.transaction(place.message("half")) as tx:
            raise error
        assert caught.value is error
        assert (error.__context__, error.__cause__) == (None, None)
        assert checks.asked == ["half"]
        assert tx.outcome is outcome
        assert texts(client, place) == delivered


def test_hooks_run_in_the_thread_that_leaves_before_the_decision(place: Place) -> None:
    seen: list[tuple[str, Outcome, int]] = []
    with opened(place) as client:
        with client.transaction(place.message("half")) as tx:
            for name in ("first", "second"):
                tx.on_leave(lambda name=name: seen.append((name, tx.outcome, threading.get_ident())))  # type: ignore[misc]
        here = threading.get_ident()
        assert seen == [("first", Outcome.OPEN, here), ("second", Outcome.OPEN, here)]
        assert tx.outcome is Outcome.COMMITTED
        with client.transaction(place.message("half")) as tx:
            tx.on_leave(lambda: pytest.fail("called although it was rolled back"))
            tx.rollback()
        with pytest.raises(OwnError), client.transaction(place.message("half")) as tx:
            tx.on_leave(lambda: pytest.fail("called although an exception left the block"))
            raise OwnError


def test_a_hook_may_roll_back(place: Place) -> None:
    with opened(place) as client:
        with client.transaction(place.message("half")) as tx:
            tx.on_leave(tx.rollback)
        assert tx.outcome is Outcome.ROLLED_BACK
        assert texts(client, place) == []


def test_what_is_deferred_is_decided_later(place: Place) -> None:
    with opened(place) as client:
        with client.transaction(place.message("later")) as tx:
            tx.defer()
        assert [tx.outcome] == [Outcome.OPEN]
        assert texts(client, place) == []
        tx.commit()
        assert tx.outcome is Outcome.COMMITTED
        with client.transaction(place.message("never")) as tx:
            tx.defer()
        Running(lambda _: tx.rollback()).join()
        with client.transaction(place.message("left to the checks")) as tx:
            tx.defer()
        tx.abandon()
        assert tx.outcome is Outcome.UNKNOWN
        with client.transaction(place.message("committed")) as tx, pytest.raises(RuntimeError, match="after defer"):
            tx.commit()
        assert texts(client, place) == ["later", "committed"]


def test_an_open_block_answers_that_it_runs(place: Place) -> None:
    checks = Checks(Decision.ROLLBACK)
    with opened(place, on_check=checks) as client:
        with client.transaction(place.message("half"), check_after=1) as tx:
            until(lambda: client.statistics().checks["running"] > 0)
        assert tx.outcome is Outcome.COMMITTED
        assert checks.asked == []
        assert texts(client, place) == ["half"]


def test_after_abandoning_the_check_is_asked(place: Place) -> None:
    checks = Checks(Decision.COMMIT)
    with opened(place, on_check=checks) as client:
        with client.transaction(place.message("half"), check_after=1) as tx:
            tx.abandon()
        assert tx.outcome is Outcome.UNKNOWN
        until(lambda: client.statistics().committed == 1)
        assert checks.asked == ["half"]
        assert texts(client, place) == ["half"]


def test_a_checker_hears_of_decisions_in_plain_methods_or_async_ones(place: Place) -> None:
    class Plain:
        def __init__(self) -> None:
            self.heard: list[tuple[bytes, Decision]] = []
            self.threads: set[str] = set()

        def check(self, message: Received) -> Decision:
            self.threads.add(threading.current_thread().name)
            return Decision.COMMIT

        def decided(self, transaction_id: bytes, decision: Decision) -> None:
            self.threads.add(threading.current_thread().name)
            self.heard.append((transaction_id, decision))

    class Async(Plain):
        async def check(self, message: Received) -> Decision:  # type: ignore[override]
            return super().check(message)

        async def decided(self, transaction_id: bytes, decision: Decision) -> None:  # type: ignore[override]
            super().decided(transaction_id, decision)

    for checker, threads in ((Plain(), {"kiteq-handler-1"}), (Async(), {"kiteq-client"})):
        with opened(place, on_check=checker) as client:
            with client.transaction(place.message("half")) as tx:
                pass
            heard = (tx.id, Decision.COMMIT)
            until(lambda checker=checker, heard=heard: heard in checker.heard)  # type: ignore[misc]
            with pytest.raises(OwnError), client.transaction(place.message("half")) as tx:
                raise OwnError
            assert tx.outcome is Outcome.COMMITTED
        assert checker.threads == threads


def test_a_check_function_may_use_the_client_and_is_found_among_the_handlers(place: Place) -> None:
    handlers = Handlers()

    @handlers.check
    def check(message: Received) -> Decision:
        client.send(place.message("from the check"))
        return Decision.ROLLBACK

    client = opened(place, handlers=handlers)
    with client:
        with pytest.raises(OwnError), client.transaction(place.message("half")) as tx:
            raise OwnError
        assert tx.outcome is Outcome.ROLLED_BACK
        assert texts(client, place) == ["from the check"]
    with pytest.raises(ValueError, match="already"):
        handlers.check(check)
    with pytest.raises(ValueError, match="not both"):
        place.client(handlers=handlers, on_check=check)


def test_an_async_check_function_is_refused() -> None:
    async def check(message: Received) -> Decision:
        raise AssertionError

    with pytest.raises(TypeError, match="async def"):
        Client("127.0.0.1", group="g", on_check=check)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="async def"):
        Handlers().check(check)  # type: ignore[type-var]


def test_without_a_block_by_what_names_it(place: Place) -> None:
    with opened(place) as client:
        client.commit(client.prepare(place.message("yes")))
        client.commit(client.prepare(place.message("yes")).id)
        client.commit(client.prepare(place.message("yes")).id.hex())
        gone = client.prepare(place.message("no"), check_after=100)
        client.rollback(gone)
        client.rollback(gone)
        with pytest.raises(TransactionConflict):
            client.commit(gone)
        with pytest.raises(UnknownTransaction):
            client.commit(b"\1" * 16)
        assert texts(client, place) == ["yes"] * 3


def test_what_cannot_be_in_a_transaction_is_refused_before_it_connects() -> None:
    client = Client("127.0.0.1:1", group="g")
    message = Message("trade", "pay")
    attempts: list[Callable[[], object]] = [
        client.transaction,
        lambda: client.transaction(message, message),
        lambda: client.transaction(Message("trade", "pay", fly=True)),
        lambda: client.transaction(message, check_after=0),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"transaction|check_after"):
            attempt()
    with pytest.raises(RuntimeError, match="not entered"):
        client.transaction(message).rollback()


def test_many_threads_each_with_their_own_transaction(place: Place) -> None:
    with opened(place) as client:

        def work(thread: int) -> None:
            for number in range(10):
                with client.transaction(place.message(f"{thread} {number}")) as tx:
                    if number % 2:
                        tx.rollback()

        Running(work, 8).join()
        assert sorted(texts(client, place)) == [
            f"{thread} {number}" for thread in range(8) for number in range(0, 10, 2)
        ]
