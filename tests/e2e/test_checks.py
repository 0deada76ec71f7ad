"""Checks over real sockets: who is asked about an undecided transaction, when, and what the answers change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.limits import PARKED_CHECK_SECONDS
from kiteq.message import Message
from kiteq.remoting.packets import (
    DECISION_COMMIT,
    DECISION_ROLLBACK,
    DECISION_RUNNING,
    DECISION_UNKNOWN,
    Ask,
    Decide,
    Goodbye,
)
from tests.e2e.wire import JumpingClock, RawClient, connect, numbered, running


async def asked(client: RawClient, clock: JumpingClock, *, step: float = 5.0, steps: int = 60) -> Ask:
    """Put the clock forward until the client is asked something."""
    for _ in range(steps):
        with trio.move_on_after(0.15):
            return await client.wait(Ask)
        clock.advance(step)
    raise AssertionError("nothing was asked")


async def disappear(client: RawClient, witness: RawClient) -> None:
    """Break a connection off and wait until the broker has noticed."""
    before = (await witness.admin("stat"))["connections"]
    await client.break_off()
    with trio.fail_after(10):
        while (await witness.admin("stat"))["connections"] == before:  # noqa: ASYNC110 the broker is asked
            await trio.sleep(0.01)


async def answer(client: RawClient, decision: int, question: Ask) -> None:
    assert await client.decide(decision, question.tokens) == []


async def answer_all(client: RawClient, clock: JumpingClock, decision: int, messages: list[Message]) -> set[int]:
    """Answer the next check of each transaction of one message; return which attempts those were."""
    left = {message.encoded() for message in messages}
    attempts: set[int] = set()
    while left:
        question = await asked(client, clock)
        assert left.issuperset(question.messages)
        left -= set(question.messages)
        assert isinstance(question.attempts, list)
        attempts |= set(question.attempts)
        await answer(client, decision, question)
    return attempts


@pytest.fixture
async def asking(server: Broker) -> RawClient:
    return await connect(server, "producers", topics=["t"], instance=b"i" * 16)


async def test_the_first_check_comes_after_its_time_and_goes_to_who_prepared(
    server: Broker, asking: RawClient, clock: JumpingClock
) -> None:
    other = await connect(server, "producers", topics=["t"])
    [message] = numbered(1)
    await asking.prepare([message])
    clock.advance(5.5)
    await asking.asked_nothing()
    clock.advance(0.7)
    question = await asking.wait(Ask)
    assert question.messages == [message.encoded()]
    assert [token[:16] for token in question.tokens] == [message.id]
    assert question.attempts == [1]
    await other.asked_nothing()
    consumer = await connect(server, "members", fanout("t"), window=10)
    await answer(asking, DECISION_COMMIT, question)
    assert len(await consumer.take(1)) == 1
    clock.advance(600)
    await asking.asked_nothing()


async def test_a_transaction_has_a_first_check_of_its_own(asking: RawClient, clock: JumpingClock) -> None:
    [message] = numbered(1)
    await asking.prepare([message], 1, 60_000)
    clock.advance(50)
    await asking.asked_nothing()
    clock.advance(11)
    assert (await asking.wait(Ask)).messages == [message.encoded()]


async def test_a_rollback_answers_a_check(server: Broker, asking: RawClient, clock: JumpingClock) -> None:
    consumer = await connect(server, "members", fanout("t"), window=10)
    await asking.prepare(numbered(1))
    await answer(asking, DECISION_ROLLBACK, await asked(asking, clock))
    await consumer.take_nothing()
    clock.advance(3600)
    await asking.asked_nothing()


async def test_checks_back_off_up_to_a_minute(asking: RawClient, clock: JumpingClock) -> None:
    await asking.prepare(numbered(1))
    waits = []
    for _ in range(6):
        before = clock.monotonic()
        question = await asked(asking, clock, step=3.0)
        waits.append(clock.monotonic() - before)
        await answer(asking, DECISION_RUNNING, question)
    for wait, expected in zip(waits, [6, 12, 24, 48, 60, 60], strict=True):
        assert expected - 1 <= wait <= expected * 1.1 + 5, waits


async def test_unknown_uses_up_the_budget_and_running_does_not(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock, check_limit=2, check_after=1.0) as broker:
        client = await connect(broker, "producers", topics=["t"])
        consumer = await connect(broker, "members", fanout("t"), window=10)
        [message] = numbered(1)
        await client.prepare([message])
        for decision in (DECISION_RUNNING, DECISION_RUNNING, DECISION_RUNNING, DECISION_UNKNOWN, DECISION_UNKNOWN):
            await answer(client, decision, await asked(client, clock))
        counters = (await client.admin("stat"))["counters"]
        assert (counters["parked"], counters["checks_running"], counters["checks_unknown"]) == (1, 3, 2)
        clock.advance(PARKED_CHECK_SECONDS / 2)
        await client.asked_nothing()
        await consumer.take_nothing()
        clock.advance(PARKED_CHECK_SECONDS)
        question = await client.wait(Ask)
        await answer(client, DECISION_UNKNOWN, question)
        newcomer = await connect(broker, "producers", topics=["t"])
        question = await client.wait(Ask)
        await newcomer.asked_nothing()
        assert await client.commit(message.id) == []
        assert len(await consumer.take(1)) == 1


async def test_another_member_is_asked_when_the_preparing_client_is_gone(
    server: Broker, asking: RawClient, clock: JumpingClock
) -> None:
    elsewhere = await connect(server, "producers", topics=["u"])
    stranger = await connect(server, "strangers", topics=["t"])
    member = await connect(server, "producers", topics=["t", "u"])
    await asking.prepare(numbered(1))
    await disappear(asking, member)
    clock.advance(20)
    await member.asked_nothing()
    clock.advance(11)
    question = await member.wait(Ask)
    await elsewhere.asked_nothing()
    await stranger.asked_nothing()
    await answer(member, DECISION_COMMIT, question)


@pytest.mark.parametrize("by_goodbye", [True, False])
async def test_a_client_that_came_under_two_addresses_is_there_while_one_connection_is(
    server: Broker, asking: RawClient, clock: JumpingClock, *, by_goodbye: bool
) -> None:
    other = await connect(server, "producers", topics=["t"])
    await asking.prepare(numbered(1))
    second = await connect(server, "producers", topics=["t"], instance=b"i" * 16)
    if by_goodbye:
        await second.send(Goodbye(0, "connected already"))
    await disappear(second, other)

    question = await asked(asking, clock)
    await answer(asking, DECISION_COMMIT, question)
    await other.asked_nothing()


async def test_nobody_of_the_group_publishes_the_topic_so_nobody_is_asked(
    server: Broker, asking: RawClient, clock: JumpingClock
) -> None:
    elsewhere = await connect(server, "producers", topics=["u"])
    await asking.prepare(numbered(1))
    await disappear(asking, elsewhere)
    clock.advance(3600)
    await elsewhere.asked_nothing(0.5)
    member = await connect(server, "producers", topics=["t"])
    assert len((await member.wait(Ask)).tokens) == 1


async def test_the_preparing_client_is_asked_as_soon_as_it_is_back(
    server: Broker, asking: RawClient, clock: JumpingClock
) -> None:
    stranger = await connect(server, "strangers")
    await asking.prepare(numbered(1))
    await disappear(asking, stranger)
    clock.advance(10)
    await trio.sleep(0.3)
    back = await connect(server, "producers", topics=["t"], instance=b"i" * 16)
    assert len((await back.wait(Ask)).tokens) == 1


async def test_a_client_that_leaves_unanswered_uses_up_nothing(
    server: Broker, asking: RawClient, clock: JumpingClock
) -> None:
    member = await connect(server, "producers", topics=["t"])
    await asking.prepare(numbered(1))
    await asked(asking, clock)
    await asking.send(Goodbye(0, "leaving"))
    await asking.break_off()
    await asked(member, clock)
    assert (await member.admin("stat"))["counters"]["checks_unanswered"] == 1


async def test_no_answer_is_asked_again(asking: RawClient, clock: JumpingClock) -> None:
    await asking.prepare(numbered(1))
    await asked(asking, clock)
    question = await asked(asking, clock)
    assert question.attempts == [2]


async def test_an_answer_of_another_group_changes_nothing(
    server: Broker, asking: RawClient, clock: JumpingClock
) -> None:
    stranger = await connect(server, "strangers", topics=["t"])
    await asking.prepare(numbered(1))
    question = await asked(asking, clock)
    for decision in (DECISION_UNKNOWN, DECISION_RUNNING):
        await stranger.decide(decision, question.tokens)
    exceptions = await stranger.decide(DECISION_ROLLBACK, question.tokens)
    assert exceptions[0][1] == "unknown_transaction"
    counters = (await asking.admin("stat"))["counters"]
    assert "checks_unknown" not in counters
    await answer(asking, DECISION_COMMIT, question)


async def test_checks_go_on_after_a_restart(folder: Path, clock: JumpingClock) -> None:
    settings: dict[str, Any] = {"check_limit": 3}
    messages = numbered(3)
    async with running(folder, clock, **settings) as broker:
        client = await connect(broker, "producers", topics=["t"], instance=b"i" * 16)
        await client.prepare(messages)
        await client.enlist(messages[0].id, numbered(1, start=10))
        for attempt in (1, 2):
            assert await answer_all(client, clock, DECISION_UNKNOWN, messages) == {attempt}
    async with running(folder, clock, **settings) as broker:
        client = await connect(broker, "producers", topics=["t"], instance=b"i" * 16)
        assert await answer_all(client, clock, DECISION_UNKNOWN, messages) == {3}
        assert (await client.admin("stat"))["counters"]["parked"] == 3
    async with running(folder, clock, **settings) as broker:
        client = await connect(broker, "producers", topics=["t"])
        consumer = await connect(broker, "members", fanout("t"), window=10)
        assert await answer_all(client, clock, DECISION_COMMIT, messages) == {4}
        assert len(await consumer.take(4)) == 4


async def test_a_broker_that_was_stopped_does_not_ask_about_everything_at_once(
    folder: Path, clock: JumpingClock
) -> None:
    async with running(folder, clock) as broker:
        client = await connect(broker, "producers", topics=["t"], instance=b"i" * 16)
        for start in range(0, 5_000, 1_000):
            await client.prepare(numbered(1_000, start=start))
    clock.advance(3600)
    async with running(folder, clock, checks_per_second=200) as broker:
        client = await connect(broker, "producers", topics=["t"], instance=b"i" * 16)
        began = trio.current_time()
        count = 0
        while trio.current_time() - began < 1.0:
            with trio.move_on_after(1.0):
                count += len((await client.wait(Ask)).tokens)
        elapsed = trio.current_time() - began
        assert 0 < count <= 200 * (elapsed + 1) + 51


async def test_a_decision_from_elsewhere_ends_the_question(
    server: Broker, asking: RawClient, clock: JumpingClock
) -> None:
    other = await connect(server, "producers", topics=["t"], instance=os.urandom(16))
    [message] = numbered(1)
    await asking.prepare([message])
    question = await asked(asking, clock)
    assert await other.roll_back(message.id) == []
    await asking.send(Decide(77, DECISION_UNKNOWN, question.tokens))
    exceptions = await asking.decide(DECISION_COMMIT, question.tokens)
    assert exceptions[0][1] == "transaction_conflict"


async def test_questions_about_large_messages_do_not_cut_the_client_off(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock) as broker:
        client = await connect(broker, "producers", topics=["t"])
        messages = [Message("t", "a", bytes(1 << 20)) for _ in range(40)]
        for message in messages:
            await client.prepare([message])
        left = {message.id for message in messages}
        while left:
            question = await asked(client, clock, step=1.5)
            await trio.sleep(0.1)  # it does not read all the time
            ids = [token[:16] for token in question.tokens]
            left.difference_update(ids)
            await client.roll_back(*ids)
