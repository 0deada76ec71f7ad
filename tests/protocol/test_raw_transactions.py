"""What doc/protocol.md says of transactions holds, for a client written from that page alone and a real broker."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.protocol import raw_transactions
from tests.protocol.raw_client import GOODBYE, RefusedError
from tests.protocol.raw_transactions import (
    COMMIT,
    DECIDE,
    DECIDED,
    ENLIST,
    PREPARE,
    PREPARED,
    ROLLBACK,
    frame,
    tokens_of,
)
from tests.protocol.world import World

pytestmark = pytest.mark.slow

LATER = 60_000
SUBSCRIBE, SUBSCRIBED, UNSUBSCRIBE, FANOUT = 18, 19, 20, 2
FLY = 2


def codes(exceptions: list[list[object]]) -> list[tuple[object, object, object]]:
    """Return index, code and temporary of each exception; every one has a reason to read."""
    assert all(reason for _index, code, reason, _temporary in exceptions if code != "duplicate")
    return [(index, code, temporary) for index, code, _reason, temporary in exceptions]


def damaged(message: bytes) -> bytes:
    """Return the message with a bit of its body changed."""
    return message[:-5] + bytes([message[-5] ^ 1]) + message[-4:]


def refused(code: str, index: int = 0) -> list[tuple[object, object, object]]:
    return [(index, code, False)]


def test_the_client_imports_nothing_of_the_product() -> None:
    source = Path(raw_transactions.__file__).read_text()
    assert re.findall(r"^(?:from|import) +(?:kiteq|tests\.support)", source, re.MULTILINE) == []


def test_nothing_is_delivered_or_counted_before_the_commit_and_all_of_it_after(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    prepared = world.message(b"prepared")
    token = producer.prepare_one(prepared, check_after_ms=LATER)
    producer.publish(world.message(b"published"))
    published = consumer.receive()
    assert published.message.body == b"published"
    assert consumer.ack(published.tag) == []
    assert consumer.bodies() == set()
    rows = consumer.admin("group.show", group=world.consumers)["topics"]
    assert {row["pending"] for row in rows} == {0}
    assert producer.decide(COMMIT, token) == []
    delivery = consumer.receive()
    assert (delivery.data, delivery.attempt) == (prepared, 1)
    assert consumer.ack(delivery.tag) == []


def test_what_is_rolled_back_is_never_delivered(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(b"given up"), world.message(b"too", world.other_topic))
    assert producer.decide(ROLLBACK, token) == []
    producer.publish(world.message(b"published"))
    assert consumer.body() == b"published"
    assert consumer.bodies() == set()


@pytest.mark.parametrize("decision", [COMMIT, ROLLBACK])
def test_several_messages_of_several_topics_are_delivered_all_or_none(world: World, decision: int) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(
        world.message(b"order"), world.message(b"bill", world.other_topic), world.message(b"second order")
    )
    assert producer.decide(decision, token) == []
    producer.publish(world.message(b"published"))
    expected = {b"order", b"bill", b"second order"} if decision == COMMIT else set()
    received = {consumer.body() for _ in range(len(expected) + 1)}
    assert received | consumer.bodies() == expected | {b"published"}


def test_of_several_transactions_in_a_frame_each_stands_for_itself(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    spared = world.message(b"beside a damaged one")
    transactions = [
        [world.message(b"first")],
        [spared, damaged(world.message())],
        [world.message(b"last"), world.message(b"last too")],
    ]
    tokens, exceptions = producer.prepare(*transactions)
    assert codes(exceptions) == refused("bad_checksum", 1)
    assert [len(token) for token in tokens] == [24, 16, 24]
    assert codes(producer.decide(COMMIT, *tokens)) == refused("unknown_transaction", 1)
    assert {consumer.body() for _ in range(3)} == {b"first", b"last", b"last too"}
    assert producer.publish(spared) == ([1], True, [])
    assert consumer.body() == b"beside a damaged one"


def test_one_number_stands_for_equal_sizes_and_one_for_handles_in_a_row(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    messages = [world.message(str(number).encode()) for number in range(6)]
    handles, exceptions = producer.ask(PREPARE, messages, 2, 0, answer=PREPARED)[:2]
    tokens = tokens_of(handles, [messages[at : at + 2] for at in (0, 2, 4)])
    assert exceptions == []
    assert producer.decide(COMMIT, tokens[0], tokens[2]) == []
    assert producer.decide(ROLLBACK, tokens[1]) == []
    assert {consumer.body() for _ in range(4)} == {b"0", b"1", b"4", b"5"}
    assert consumer.bodies() == set()


@pytest.mark.parametrize(("first", "second"), [(COMMIT, ROLLBACK), (ROLLBACK, COMMIT)])
def test_the_first_decision_wins_and_may_be_repeated(world: World, first: int, second: int) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message())
    assert producer.decide(first, token) == []
    assert producer.decide(first, token, token[:16]) == []
    assert codes(producer.decide(second, token)) == refused("transaction_conflict")
    assert producer.decide(first, token) == []
    producer.publish(world.message(b"published"))
    expected = [b"order", b"published"] if first == COMMIT else [b"published"]
    assert sorted(consumer.body() for _ in expected) == expected
    assert consumer.bodies() == set()


def test_what_nobody_prepared_is_unknown(world: World) -> None:
    producer = world.producer()
    known = producer.prepare_one(world.message())
    strange = os.urandom(24)
    assert codes(producer.decide(COMMIT, strange, known, strange[:16])) == [
        (0, "unknown_transaction", False),
        (2, "unknown_transaction", False),
    ]
    assert codes(producer.decide(ROLLBACK, strange)) == refused("unknown_transaction")
    assert codes(producer.enlist(strange, world.message())) == refused("unknown_transaction")


def test_the_transaction_of_another_group_is_unknown_and_stays_open(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    stranger = world.producer(group=f"not-{world.group}")
    token = producer.prepare_one(world.message())
    for decision in (COMMIT, ROLLBACK):
        for named in (token, token[:16]):
            assert codes(stranger.decide(decision, named)) == refused("unknown_transaction")
    assert codes(stranger.enlist(token, world.message(b"smuggled"))) == refused("unknown_transaction")
    assert consumer.bodies() == set()
    assert producer.decide(COMMIT, token) == []
    assert consumer.body() == b"order"
    assert consumer.bodies() == set()


def test_the_id_alone_names_a_transaction(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(b"first"))
    assert producer.enlist(token[:16], world.message(b"second")) == []
    assert producer.decide(COMMIT, token[:16]) == []
    assert {consumer.body(), consumer.body()} == {b"first", b"second"}


def test_a_member_of_the_group_may_decide_what_another_prepared(world: World) -> None:
    producer, member, consumer = world.producer(), world.producer(), world.consumer()
    token = producer.prepare_one(world.message())
    assert member.decide(COMMIT, token) == []
    assert consumer.body() == b"order"
    assert codes(producer.decide(ROLLBACK, token)) == refused("transaction_conflict")


def test_repeats_byte_for_byte_after_a_reconnect_are_answered_the_same(world: World) -> None:
    consumer, instance = world.consumer(), os.urandom(16)
    messages = [world.message(b"1"), world.message(b"2", world.other_topic), world.message(b"3")]

    def twice(data: bytes) -> list[list[Any]]:
        answers = []
        for _ in range(2):
            with world.producer(instance=instance) as client:
                answers.append(client.exchange(data))
        return answers

    prepare = frame(PREPARE, 7, messages, [2, 1], LATER)
    answers = twice(prepare)
    assert [(kind, request, exceptions) for kind, request, _, exceptions in answers] == [(PREPARED, 7, [])] * 2
    (kept, dropped), again = (tokens_of(handles, [messages[:2], messages[2:]]) for _, _, handles, _ in answers)
    assert again == [kept, dropped]
    handle = int.from_bytes(kept[16:], "big")
    assert twice(frame(ENLIST, 8, kept, [world.message(b"4")])) == [[PREPARED, 8, handle, []]] * 2
    assert twice(frame(DECIDE, 9, COMMIT, [kept])) == [[DECIDED, 9, []]] * 2
    assert twice(frame(DECIDE, 10, ROLLBACK, [dropped])) == [[DECIDED, 10, []]] * 2
    late = world.producer(instance=instance).exchange(prepare)
    assert late[:3] == [PREPARED, 7, [0, 0]]
    assert codes(late[3]) == [(0, "transaction_conflict", False), (1, "transaction_conflict", False)]
    assert sorted(consumer.body() for _ in range(3)) == [b"1", b"2", b"4"]
    assert consumer.bodies() == set()


def test_a_prepare_whose_answer_nobody_read_is_stored_once(world: World) -> None:
    consumer = world.consumer()
    for round_number in range(5):
        body = str(round_number).encode()
        data = frame(PREPARE, 3, [message := world.message(body)], 1, LATER)
        lost = world.producer()
        lost.send_bytes(data)
        lost.__exit__()
        again = world.producer(instance=lost.instance)
        _, _, handle, exceptions = again.exchange(data)
        assert exceptions == []
        assert again.decide(COMMIT, *tokens_of(handle, [[message]])) == []
        assert consumer.body() == body
    assert consumer.bodies() == set()


def test_transactions_and_decisions_outlive_a_killed_broker(own_world: World) -> None:
    world, instance = own_world, os.urandom(16)
    world.consumer()
    producer = world.producer(instance=instance)
    prepare = frame(PREPARE, 7, [message := world.message(b"open")], 1, LATER)
    answer = producer.exchange(prepare)
    token = tokens_of(answer[2], [[message]])[0]
    commit = frame(DECIDE, 8, COMMIT, [producer.prepare_one(world.message(b"committed"))])
    rollback = frame(DECIDE, 9, ROLLBACK, [producer.prepare_one(world.message(b"rolled back"))])
    decided = [producer.exchange(commit), producer.exchange(rollback)]
    world.broker.kill()
    world.broker.start()
    producer, consumer = world.producer(instance=instance), world.consumer()
    assert [producer.exchange(commit), producer.exchange(rollback)] == decided
    assert producer.exchange(prepare) == answer
    assert consumer.body() == b"committed"
    assert producer.decide(COMMIT, token) == []
    assert consumer.body() == b"open"
    assert consumer.bodies() == set()


def test_the_groups_bound_at_the_commit_get_it(world: World) -> None:
    producer, early, staying = world.producer(), world.consumer(f"early-{world.group}"), world.consumer()
    token = producer.prepare_one(world.message())
    late = world.consumer(f"late-{world.group}")
    early.ask(UNSUBSCRIBE, world.topic, FANOUT, "*", answer=SUBSCRIBED)
    assert producer.decide(COMMIT, token) == []
    assert (late.body(), staying.body()) == (b"order", b"order")
    assert early.bodies() == set()


def test_enlisted_messages_share_the_fate_of_the_transaction(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    kept, dropped = producer.prepare([world.message(b"1")], [world.message(b"2")])[0]
    assert producer.enlist(kept, world.message(b"1a", world.other_topic), world.message(b"1b")) == []
    assert producer.enlist(kept, world.message(b"1c")) == []
    assert producer.enlist(dropped, world.message(b"2a")) == []
    assert producer.decide(ROLLBACK, dropped) == []
    assert producer.decide(COMMIT, kept) == []
    assert {consumer.body() for _ in range(4)} == {b"1", b"1a", b"1b", b"1c"}
    assert consumer.bodies() == set()
    for decided in (kept, dropped):
        assert codes(producer.enlist(decided, world.message())) == refused("unknown_transaction")


def test_of_one_enlist_all_messages_are_added_or_none(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(b"first"))
    spared = world.message(b"spared")
    assert codes(producer.enlist(token, spared, damaged(world.message()))) == refused("bad_checksum")
    assert codes(producer.enlist(token, spared, world.message(flags=FLY))) == refused("fly_not_allowed")
    assert producer.decide(COMMIT, token) == []
    assert consumer.body() == b"first"
    assert producer.publish(spared) == ([1], True, [])
    assert consumer.body() == b"spared"


def test_so_much_may_be_added_to_a_transaction_and_no_more(world: World) -> None:
    producer, mebibyte = world.producer(), bytes(1_048_576)
    token = producer.prepare_one(world.message(), check_after_ms=LATER)
    for _ in range(15):
        assert producer.enlist(token, world.message(mebibyte)) == []
    # The sixteenth is more than what is left: a message is longer than its body.
    assert codes(producer.enlist(token, world.message(mebibyte))) == refused("transaction_too_large")
    assert producer.enlist(token, world.message(b"small")) == []
    assert producer.decide(ROLLBACK, token) == []


def test_what_is_committed_for_nobody_is_kept_for_a_group_that_starts_with_the_first(world: World) -> None:
    producer, late = world.producer(), world.producer(group=world.consumers)
    token = producer.prepare_one(world.message(), world.message(b"bill", world.other_topic))
    assert producer.decide(COMMIT, token) == []
    late.grant(10)
    late.ask(SUBSCRIBE, [[world.topic, FANOUT, "*", None, True, "first"]], answer=SUBSCRIBED)
    assert late.body() == b"order"
    assert late.bodies() == set()


def test_what_is_stored_elsewhere_is_not_enlisted(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    messages = [world.message(body) for body in (b"sent", b"open", b"rolled back")]
    producer.publish(messages[0])
    producer.prepare_one(world.message(), messages[1], check_after_ms=LATER)
    producer.decide(ROLLBACK, producer.prepare_one(messages[2]))
    token = producer.prepare_one(world.message(b"first"), check_after_ms=LATER)
    for message in messages:
        assert codes(producer.enlist(token, message)) == refused("id_reused")
        assert codes(producer.enlist(token, world.message(), message)) == refused("id_reused")
    assert producer.decide(COMMIT, token) == []
    assert {consumer.body(), consumer.body()} == {b"sent", b"first"}
    assert consumer.bodies() == set()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"flags": FLY}, "fly_not_allowed"),
        ({"ttl_ms": 0}, "bad_limit"),
        ({"deliver_limit": 101}, "bad_limit"),
        ({"topic": "tr ade"}, "bad_name"),
        ({"flags": 4}, "bad_message"),
        ({"body": bytes(1_048_577)}, "message_too_large"),
        ({"properties": {str(number): "" for number in range(129)}}, "bad_properties"),
    ],
)
def test_the_rules_of_publishing_hold_for_prepared_messages(world: World, fields: dict[str, Any], code: str) -> None:
    producer = world.producer()
    message = world.message(**fields)
    tokens, exceptions = producer.prepare([world.message(), message], [world.message()])
    assert codes(exceptions) == refused(code)
    assert [len(token) for token in tokens] == [16, 24]


def test_prepared_ids_are_remembered_as_sent_ones_are(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    kept, dropped, sent = world.message(b"kept"), world.message(b"dropped"), world.message(b"sent")
    tokens = producer.prepare([kept], [dropped])[0]
    duplicates = [(0, "duplicate", False), (1, "duplicate", False)]
    assert codes(producer.publish(kept, dropped)[2]) == duplicates
    producer.decide(COMMIT, tokens[0])
    producer.decide(ROLLBACK, tokens[1])
    assert codes(producer.publish(kept, dropped)[2]) == duplicates
    assert codes(producer.prepare([world.message(b"other", id=kept[:16])])[1]) == refused("id_reused")
    producer.publish(sent)
    assert codes(producer.prepare([sent])[1]) == refused("transaction_conflict")
    assert codes(producer.prepare([world.message(), sent])[1]) == refused("id_reused")
    twice = world.message()
    assert codes(producer.prepare([twice, twice])[1]) == refused("id_reused")
    assert {consumer.body(), consumer.body()} == {b"kept", b"sent"}
    assert consumer.bodies() == set()


def test_the_ttl_counts_from_the_commit(world: World) -> None:
    producer, consumer = world.producer(), world.consumer()
    token = producer.prepare_one(world.message(ttl_ms=1_000))
    time.sleep(1.2)
    assert producer.decide(COMMIT, token) == []
    assert consumer.body() == b"order"


def test_a_group_has_so_many_open_transactions_and_no_more(world: World) -> None:
    producer = world.producer()
    tokens, exceptions = producer.prepare(*([world.message()] for _ in range(40)), check_after_ms=LATER)
    assert exceptions == []
    assert codes(producer.prepare([world.message()])[1]) == [(0, "half_quota", True)]
    assert world.producer(group=f"not-{world.group}").prepare([world.message()])[1] == []
    assert producer.decide(ROLLBACK, *tokens[:1]) == []
    assert producer.prepare([world.message()], check_after_ms=LATER)[1] == []
    assert producer.decide(ROLLBACK, *tokens[1:]) == []


def test_a_draining_broker_takes_decisions_and_nothing_new(own_world: World) -> None:
    producer = own_world.producer()
    kept, dropped = producer.prepare([own_world.message()], [own_world.message()], check_after_ms=LATER)[0]
    os.kill(own_world.broker.pid, signal.SIGTERM)
    producer.wait_for(GOODBYE)
    for request in (
        lambda: producer.prepare([own_world.message()]),
        lambda: producer.enlist(kept, own_world.message()),
    ):
        with pytest.raises(RefusedError) as error:
            request()
        assert (error.value.args[0], error.value.args[2]) == ("draining", True)
    assert producer.decide(COMMIT, kept) == []
    assert producer.decide(ROLLBACK, dropped) == []


@pytest.mark.parametrize("check_after_ms", [100, 86_400_000])
def test_the_ends_of_the_range_of_check_after_are_taken(world: World, check_after_ms: int) -> None:
    assert len(world.producer().prepare_one(world.message(), check_after_ms=check_after_ms)) == 24
