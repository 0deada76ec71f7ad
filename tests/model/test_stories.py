"""Stories that the random ones meet too seldom."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kiteq.limits import HALF_CACHE_BYTES_MAX
from kiteq.message import Message
from kiteq.remoting.packets import (
    DECISION_COMMIT,
    DECISION_ROLLBACK,
    DECISION_UNKNOWN,
    Ask,
    Decide,
    Decided,
    Enlist,
    Prepare,
    Prepared,
)
from tests.model.harness import Connection, Harness, limit_cache

P1, P2, Q1 = b"1" * 16, b"2" * 16, b"3" * 16


@pytest.fixture
def harness() -> Iterator[Harness]:
    yield Harness(check_limit=1)
    limit_cache(HALF_CACHE_BYTES_MAX)


def prepare(harness: Harness, connection: Connection, count: int = 1) -> list[bytes]:
    blobs = [Message("t", "a", b"x").encoded() for _ in range(count)]
    harness.send(connection, Prepare(connection.next_request(), blobs, 1, 0))
    harness.commit()
    [prepared] = connection.take(Prepared)
    assert prepared.exceptions == []
    return [blob[:16] for blob in blobs]


def decide(harness: Harness, connection: Connection, decision: int, *ids: bytes) -> None:
    harness.send(connection, Decide(connection.next_request(), decision, list(ids)))
    harness.commit()
    [decided] = connection.take(Decided)
    assert decided.exceptions == []


def asked(harness: Harness, connection: Connection, seconds: float) -> list[bytes]:
    """Let time pass, and return the transactions that a client is asked about then."""
    harness.clock.advance(seconds)
    harness.tick()
    return [token[:16] for ask in connection.take(Ask) for token in ask.tokens]


def test_a_new_transaction_is_not_asked_about_early_for_a_parked_one_whose_place_it_takes(harness: Harness) -> None:
    producer = harness.connect("p", instance=P1, topics=["t"])
    [parked] = prepare(harness, producer)
    assert asked(harness, producer, 7) == [parked]
    decide(harness, producer, DECISION_UNKNOWN, parked)
    decide(harness, producer, DECISION_ROLLBACK, parked)
    [new] = prepare(harness, producer)
    harness.connect("p", instance=P2, topics=["t"])
    assert asked(harness, producer, 1) == []
    assert asked(harness, producer, 6) == [new]


def test_a_commit_waits_for_a_message_that_is_being_added(harness: Harness) -> None:
    limit_cache(1)
    producer = harness.connect("p", instance=P1, topics=["t"])
    [transaction] = prepare(harness, producer)
    prepare(harness, producer)
    added = Message("t", "a", b"added")
    harness.send(producer, Enlist(7, transaction, [added.encoded()]), Decide(8, DECISION_COMMIT, [transaction]))
    harness.commit()
    assert [one.exceptions for one in producer.take(Prepared)] == [[]]
    assert [one.exceptions for one in producer.take(Decided)] == [[]]


def test_a_question_waits_for_a_message_that_is_being_added(harness: Harness) -> None:
    producer = harness.connect("p", instance=P1, topics=["t"])
    [transaction] = prepare(harness, producer)
    harness.send(producer, Enlist(7, transaction, [Message("t", "a", b"added").encoded()]))
    assert asked(harness, producer, 7) == [transaction]


def test_transactions_about_which_nobody_can_be_asked_do_not_hold_up_the_others(harness: Harness) -> None:
    absent = harness.connect("q", instance=Q1, topics=["t"])
    prepare(harness, absent, 1_000)
    harness.leave(absent, goodbye=True)
    producer = harness.connect("p", instance=P1, topics=["t"])
    [transaction] = prepare(harness, producer)
    assert asked(harness, producer, 40) == [transaction]


def test_a_decision_about_nothing_is_answered(harness: Harness) -> None:
    producer = harness.connect("p", instance=P1, topics=["t"])
    decide(harness, producer, DECISION_COMMIT)
    decide(harness, producer, DECISION_UNKNOWN)
