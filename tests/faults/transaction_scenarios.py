"""Short, exact runs, each of which walks through one promise about transactions."""

from __future__ import annotations

from typing import Final

import trio

from kiteq.binding.bindings import direct, fanout
from kiteq.message import Message
from tests.faults.driver import DriverConnection
from tests.faults.half_driver import COMMIT, ROLLBACK, RUNNING, UNKNOWN, Question
from tests.faults.scenarios import Scenario, Stage

__all__ = ["TRANSACTION_SCENARIOS"]

TOPICS: Final = ("orders", "events")
LOOK_SECONDS: Final = 0.3
"""For what must not come: some times the check's first delay of these runs."""
ASK_SECONDS_MAX: Final = 3.0
LATER: Final = 60.0
"""A first check that these runs do not see."""


async def _groups(stage: Stage) -> None:
    await stage.bind("books", *map(fanout, TOPICS))
    await stage.bind("mail", direct("orders", "paid"))


def _one(topic: str = "orders") -> list[Message]:
    return [Message(topic, "paid", b"half")]


def _id(messages: list[Message]) -> str:
    return messages[0].id.hex()


async def _prepare(connection: DriverConnection, *transactions: list[Message], check_after: float = LATER) -> list[str]:
    await connection.transacting.prepare(*transactions, check_after=check_after)
    await connection.answered()
    return [_id(messages) for messages in transactions]


async def _decide(connection: DriverConnection, decision: int, *transactions: str) -> None:
    await connection.transacting.decide(decision, *transactions)
    await connection.answered()


async def _question(connection: DriverConnection, seconds: float = ASK_SECONDS_MAX) -> Question | None:
    """Return the next question; None when none comes in time."""
    questions = connection.transacting.questions
    with trio.move_on_after(seconds):
        while not questions:
            await connection.receive()
    return questions.pop(0) if questions else None


async def _again(stage: Stage, *leaving: DriverConnection) -> DriverConnection:
    """Kill the broker and start it again; return a new producer."""
    await stage.kill()
    for connection in leaving:
        await connection.drop()
    await stage.start()
    return await stage.producer(TOPICS)


async def undecided_for_a_while(stage: Stage) -> None:
    """What is prepared and not decided is seen by nobody."""
    await _groups(stage)
    consumer = await stage.consumer("books")
    producer = await stage.producer(TOPICS)
    await _prepare(producer, _one(), [*_one(), *_one("events")])
    with trio.move_on_after(LOOK_SECONDS):
        while True:
            arrived = await consumer.receive()
            await consumer.ack([arrival.tag for arrival in arrived])
    await stage.look()
    await consumer.goodbye()
    await producer.drop()


async def kill_after_prepare(stage: Stage) -> None:
    """What was prepared is still there after a kill, and can be committed."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    [one] = await _prepare(producer, _one())
    producer = await _again(stage, producer)
    await _decide(producer, COMMIT, one)
    await producer.goodbye()


async def kill_after_some_of_a_row_were_rolled_back(stage: Stage) -> None:
    """What was rolled back stays so, also when others of its row are open; the broker refuses a commit."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    first, second, _ = await _prepare(producer, _one(), _one(), _one())
    await _decide(producer, ROLLBACK, first)
    await _decide(producer, COMMIT, second)
    producer = await _again(stage, producer)
    await _decide(producer, COMMIT, first)
    await _decide(producer, COMMIT, second)
    await producer.goodbye()


async def kill_after_rollback(stage: Stage) -> None:
    """A rollback that was confirmed outlives the process."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    [one] = await _prepare(producer, _one())
    await _decide(producer, ROLLBACK, one)
    producer = await _again(stage, producer)
    await _decide(producer, COMMIT, one)
    await producer.goodbye()


async def kill_after_commit(stage: Stage) -> None:
    """A commit that was confirmed outlives the process."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    [one] = await _prepare(producer, [*_one(), *_one("events"), *_one()])
    await _decide(producer, COMMIT, one)
    producer = await _again(stage, producer)
    await producer.goodbye()


async def commit_after_rollback(stage: Stage) -> None:
    """The first decision is final: the opposite is refused, the same again is confirmed."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    first, second = await _prepare(producer, _one(), _one())
    await _decide(producer, ROLLBACK, first)
    await _decide(producer, COMMIT, second)
    for decision in (COMMIT, ROLLBACK):
        await _decide(producer, decision, first)
        await _decide(producer, decision, second)
    await producer.goodbye()


async def opposite_decisions_at_once(stage: Stage) -> None:
    """Of opposite decisions in the same moment one wins, and the other is told so."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    rival = await stage.producer(TOPICS)
    ids = await _prepare(producer, *[_one() for _ in range(50)])
    await producer.transacting.decide(COMMIT, *ids)
    await rival.transacting.decide(ROLLBACK, *ids)
    await producer.transacting.decide(ROLLBACK, *ids)
    await producer.answered()
    await rival.answered()
    await producer.goodbye()
    await rival.goodbye()


async def decided_by_a_stranger(stage: Stage) -> None:
    """Another group decides nothing."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    stranger = await stage.producer(TOPICS, group="stranger")
    first, second = await _prepare(producer, _one(), _one())
    await _decide(stranger, COMMIT, first)
    await _decide(stranger, ROLLBACK, second)
    await _decide(producer, COMMIT, first, second)
    await producer.goodbye()
    await stranger.goodbye()


async def asked_while_strangers_are_there(stage: Stage) -> None:
    """Nobody of another group is asked, and of the own group only who publishes the topics."""
    await _groups(stage)
    stranger = await stage.producer(TOPICS, group="stranger")
    elsewhere = await stage.producer(TOPICS[1:])
    producer = await stage.producer(TOPICS)
    await _prepare(producer, *[_one() for _ in range(5)], check_after=0.1)
    await producer.drop()
    await _question(stranger, LOOK_SECONDS)
    await _question(elsewhere, LOOK_SECONDS)
    member = await stage.producer(TOPICS)
    for _ in range(5):
        if (question := await _question(member)) is None:
            break
        await _decide(member, COMMIT, question.id)
    for connection in (stranger, elsewhere, member):
        await connection.goodbye()


async def unknown_to_the_last_check(stage: Stage) -> None:
    """When nobody knows what became of a transaction it is parked, and nothing else."""
    await _answer_always(stage, UNKNOWN)


async def running_for_long(stage: Stage) -> None:
    """A local transaction that runs for long uses up no check."""
    await _answer_always(stage, RUNNING)


async def _answer_always(stage: Stage, answer: int) -> None:
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    await _prepare(producer, _one(), check_after=0.1)
    for _ in range(stage.check_limit):
        if (question := await _question(producer)) is None:
            break
        await _decide(producer, answer, question.id)
    await _question(producer, LOOK_SECONDS)
    await producer.drop()


async def kill_after_more_was_added(stage: Stage) -> None:
    """All messages of a transaction are delivered, or none, also those that were added before a kill."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    [one] = await _prepare(producer, _one())
    for topic in TOPICS:
        await producer.transacting.enlist(one, *_one(topic), *_one(topic))
        await producer.answered()
    producer = await _again(stage, producer)
    await _decide(producer, COMMIT, one)
    await producer.goodbye()


async def kill_after_tidying(stage: Stage) -> None:
    """Decided transactions stay decided when the rows that they share with open ones were tidied."""
    await _groups(stage)
    producer = await stage.producer(TOPICS)
    first, second, _ = await _prepare(producer, _one(), _one(), _one())
    await _decide(producer, ROLLBACK, first)
    await _decide(producer, COMMIT, second)
    await trio.sleep(LOOK_SECONDS)
    producer = await _again(stage, producer)
    await _decide(producer, COMMIT, first)
    await producer.goodbye()


TRANSACTION_SCENARIOS: Final[tuple[Scenario, ...]] = (
    undecided_for_a_while,
    kill_after_prepare,
    kill_after_some_of_a_row_were_rolled_back,
    kill_after_rollback,
    kill_after_commit,
    commit_after_rollback,
    opposite_decisions_at_once,
    decided_by_a_stranger,
    asked_while_strangers_are_there,
    unknown_to_the_last_check,
    running_for_long,
    kill_after_more_was_added,
    kill_after_tidying,
)
