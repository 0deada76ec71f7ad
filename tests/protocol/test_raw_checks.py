"""The checks of undecided transactions and the administrator's verbs for them are as doc/protocol.md says."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from tests.protocol.raw_client import RefusedError
from tests.protocol.raw_transactions import COMMIT, ROLLBACK, RUNNING, UNKNOWN, TransactionClient
from tests.protocol.world import World

pytestmark = pytest.mark.slow

SOON, LATER = 100, 60_000


def row(client: TransactionClient, token: bytes) -> dict[str, Any]:
    """Return what an administrator is shown of a transaction."""
    shown: dict[str, Any] = client.admin("tx.show", id=token[:16].hex())
    return shown


def parked(client: TransactionClient, token: bytes) -> None:
    """Answer two questions about the one transaction by "unknown"."""
    for _ in range(2):
        assert client.question().token == token
        assert client.decide(UNKNOWN, token) == []
    assert row(client, token)["state"] == "parked"


def test_a_question_names_the_transaction_and_shows_its_first_message(world: World) -> None:
    producer = world.producer()
    first = world.message(b"first", properties={"order": "7"})
    token = producer.prepare_one(first, world.message(b"second"))
    assert producer.question() == (1, token, first)


@pytest.mark.parametrize("answer", [COMMIT, ROLLBACK])
def test_a_question_answered_for_certain_ends_it(world: World, answer: int) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(), check_after_ms=SOON)
    assert producer.question().token == token
    assert producer.decide(answer, token) == []
    producer.publish(world.message(b"published"))
    expected = [b"order", b"published"] if answer == COMMIT else [b"published"]
    assert sorted(consumer.body() for _ in expected) == expected
    time.sleep(0.5)
    assert producer.questions() == []
    assert row(producer, token)["state"] == "decided"


def test_running_is_asked_again_and_never_parks(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(), check_after_ms=SOON)
    for attempt in (1, 2, 3):
        assert producer.question()[:2] == (attempt, token)
        assert producer.decide(RUNNING, token) == []
    shown = row(producer, token)
    assert (shown["state"], shown["asks"], shown["unknowns"]) == ("open", 3, 0)
    assert producer.decide(COMMIT, token) == []
    assert consumer.body() == b"order"


def test_one_decide_answers_several_questions(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    tokens = producer.prepare([world.message(b"1")], [world.message(b"2")], check_after_ms=SOON)[0]
    assert {producer.question().token, producer.question().token} == set(tokens)
    assert producer.decide(COMMIT, *tokens) == []
    assert {consumer.body(), consumer.body()} == {b"1", b"2"}


def test_unknown_parks_and_the_next_client_of_the_group_is_asked(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(), check_after_ms=SOON)
    parked(producer, token)
    [listed] = producer.admin("tx.list", state="parked", group=world.group)
    assert listed["id"] == token[:16].hex()
    assert producer.admin("tx.list", group=world.group) == [listed]
    time.sleep(1.0)
    assert producer.questions() == []
    world.producer()
    assert producer.question()[:2] == (3, token)
    assert consumer.bodies() == set()
    assert producer.decide(COMMIT, token) == []
    assert consumer.body() == b"order"


def test_a_parked_transaction_is_resumed_by_an_administrator(world: World) -> None:
    producer = world.producer()
    token = producer.prepare_one(world.message(), check_after_ms=SOON)
    parked(producer, token)
    assert producer.admin("tx.resume", id=token[:16].hex()) == {"id": token[:16].hex(), "resumed": True}
    assert producer.question().token == token
    shown = row(producer, token)
    assert (shown["state"], shown["unknowns"]) == ("open", 0)
    assert producer.decide(ROLLBACK, token) == []
    with pytest.raises(RefusedError, match="unknown_transaction"):
        producer.admin("tx.resume", id=token[:16].hex())


def test_another_member_with_the_topics_is_asked_after_the_preparer_is_gone(world: World) -> None:
    consumer = world.consumer()
    without, stranger = world.producer(world.topic), world.producer(group=f"not-{world.group}")
    with world.producer() as preparer:
        token = preparer.prepare_one(world.message(b"1"), world.message(b"2", world.other_topic), check_after_ms=SOON)
        member = world.producer()
        assert preparer.question().token == token
        assert member.questions() == []
        preparer.decide(RUNNING, token)
        preparer.goodbye()
    assert member.question()[1] == token
    assert without.questions() + stranger.questions() == []
    assert member.decide(COMMIT, token) == []
    assert {consumer.body(), consumer.body()} == {b"1", b"2"}


def test_the_preparer_is_asked_again_when_it_comes_back(world: World) -> None:
    instance = os.urandom(16)
    with world.producer(instance=instance) as before:
        token = before.prepare_one(world.message(), check_after_ms=SOON)
        assert before.question()[:2] == (1, token)
    # Its connection is gone, and with it the question; nobody else may be asked.
    again = world.producer(instance=instance)
    assert again.question()[1] == token
    assert row(again, token)["unknowns"] == 0
    assert again.decide(COMMIT, token) == []


def test_the_preparer_is_asked_whatever_its_topics(world: World) -> None:
    producer = world.producer(world.other_topic)
    token = producer.prepare_one(world.message(), check_after_ms=SOON)
    assert producer.question().token == token


@pytest.mark.parametrize("answer", [UNKNOWN, RUNNING])
def test_an_answer_nobody_asked_for_changes_nothing(world: World, answer: int) -> None:
    producer, stranger = world.producer(), world.producer(group=f"not-{world.group}")
    token = producer.prepare_one(world.message(), check_after_ms=LATER)
    for client in (producer, stranger):
        for _ in range(3):
            assert client.decide(answer, token, os.urandom(24)) == []
    shown = row(producer, token)
    assert (shown["state"], shown["asks"], shown["unknowns"]) == ("open", 0, 0)
    assert producer.decide(ROLLBACK, token) == []
    assert producer.decide(answer, token) == []


def test_the_answer_of_another_group_does_not_count(world: World) -> None:
    producer, stranger = world.producer(), world.producer(group=f"not-{world.group}")
    token = producer.prepare_one(world.message(), check_after_ms=SOON)
    assert producer.question().token == token
    for _ in range(3):
        assert stranger.decide(UNKNOWN, token) == []
    shown = row(producer, token)
    assert (shown["state"], shown["unknowns"]) == ("open", 0)


def test_any_connection_of_the_group_may_answer_the_question(world: World) -> None:
    producer, member = world.producer(), world.producer()
    token = producer.prepare_one(world.message(), check_after_ms=SOON)
    assert producer.question().token == token
    assert member.decide(UNKNOWN, token) == []
    assert row(producer, token)["unknowns"] == 1


def test_one_connection_of_an_instance_is_asked(world: World) -> None:
    instance = os.urandom(16)
    clients = [world.producer(instance=instance) for _ in range(2)]
    token = clients[0].prepare_one(world.message(), check_after_ms=SOON)
    time.sleep(0.5)
    assert [question.token for client in clients for question in client.questions()] == [token]


def test_an_answer_given_twice_counts_once(world: World) -> None:
    producer = world.producer()
    token = producer.prepare_one(world.message(), check_after_ms=SOON)
    assert producer.question().token == token
    assert producer.decide(UNKNOWN, token, token) == []
    assert producer.decide(UNKNOWN, token) == []
    assert row(producer, token)["unknowns"] == 1


def test_a_restarted_broker_goes_on_asking(own_world: World) -> None:
    instance = os.urandom(16)
    token = own_world.producer(instance=instance).prepare_one(own_world.message(), check_after_ms=SOON)
    own_world.broker.kill()
    own_world.broker.start()
    again, consumer = own_world.producer(instance=instance), own_world.consumer()
    assert again.question().token == token
    assert again.decide(COMMIT, token) == []
    assert consumer.body() == b"order"


def test_transactions_are_listed_for_an_administrator(world: World) -> None:
    producer = world.producer()
    both, one = producer.prepare(
        [world.message(), world.message(b"bill", world.other_topic)], [world.message()], check_after_ms=LATER
    )[0]
    mine = {"group": world.group}
    ids = [both[:16].hex(), one[:16].hex()]
    rows = producer.admin("tx.list", **mine)
    assert [listed["id"] for listed in rows] == ids
    assert [(listed["messages"], set(listed["topics"])) for listed in rows] == [
        (2, {world.topic, world.other_topic}),
        (1, {world.topic}),
    ]
    assert {(listed["state"], listed["asks"], listed["decision"]) for listed in rows} == {("open", 0, None)}
    assert [listed["id"] for listed in producer.admin("tx.list", topic=world.other_topic, **mine)] == ids[:1]
    assert [listed["id"] for listed in producer.admin("tx.list", limit=1, **mine)] == ids[:1]
    assert producer.admin("tx.list", older_than_s=60, **mine) == []
    assert producer.admin("tx.list", state="parked", **mine) == []
    assert producer.decide(COMMIT, both) == []
    assert producer.decide(ROLLBACK, one) == []
    assert producer.admin("tx.list", **mine) == []
    decided = producer.admin("tx.list", state="decided", **mine)
    assert {listed["id"]: listed["decision"] for listed in decided} == dict(
        zip(ids, ("committed", "rolled back"), strict=True)
    )


@pytest.mark.parametrize(("verb", "decision"), [("tx.commit", COMMIT), ("tx.rollback", ROLLBACK)])
def test_an_administrator_decides_with_a_reason(world: World, verb: str, decision: int) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(), check_after_ms=LATER)
    named = {"id": token[:16].hex()}
    for reason in ({}, {"reason": ""}):
        with pytest.raises(RefusedError, match="bad_argument"):
            producer.admin(verb, **named, **reason)
    said = ("rolled back", "committed")[decision]
    assert producer.admin(verb, **named, reason="the ledger says so") == {**named, "decision": said, "changed": True}
    assert producer.admin(verb, **named, reason="again") == {**named, "decision": said, "changed": False}
    other = "tx.commit" if decision == ROLLBACK else "tx.rollback"
    with pytest.raises(RefusedError, match="transaction_conflict"):
        producer.admin(other, **named, reason="no")
    assert producer.decide(decision, token) == []
    assert producer.decide(1 - decision, token)[0][1] == "transaction_conflict"
    shown = row(producer, token)
    assert (shown["state"], shown["decision"], shown["reason"]) == ("decided", said, "the ledger says so")
    latest = producer.admin("tx.audit", limit=1)[0]
    assert (latest["id"], latest["group"], latest["reason"]) == (named["id"], world.group, "the ledger says so")
    producer.publish(world.message(b"published"))
    expected = [b"order", b"published"] if decision == COMMIT else [b"published"]
    assert sorted(consumer.body() for _ in expected) == expected


@pytest.mark.parametrize("verb", ["tx.show", "tx.commit", "tx.rollback", "tx.resume"])
def test_an_administrator_is_told_what_is_not_there(world: World, verb: str) -> None:
    producer = world.producer()
    arguments = {"reason": "why not"} if verb in {"tx.commit", "tx.rollback"} else {}
    for identity, code in (("0" * 32, "unknown_transaction"), ("0" * 31, "bad_argument"), (7, "bad_argument")):
        with pytest.raises(RefusedError, match=code):
            producer.admin(verb, id=identity, **arguments)
