"""Producers and consumers of every temper, which go on through crashes of the broker until told to drain."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Final, NamedTuple

import trio

from kiteq.binding.bindings import Binding
from kiteq.message import Message
from kiteq.remoting.packets import NACK_FAILED, NACK_REJECTED, NACK_UNSTARTED
from tests.faults.driver import Arrival, DriverConnection, Lost, open_connection
from tests.faults.history import (
    Drained,
    FinalDead,
    FinalGroup,
    FinalTransaction,
    History,
    PublishOk,
    Waiting,
    digest_of,
)

__all__ = [
    "CALM",
    "FUSSY",
    "SLOW",
    "Load",
    "Temper",
    "consume",
    "count_left",
    "drain",
    "final_state",
    "note_waiting",
    "produce",
]

RECONNECT_SECONDS: Final = 0.05
EXTEND_SECONDS: Final = 0.5
HOLD_SECONDS_MAX: Final = 5.0
"""Longer than the ack deadline of these runs."""
DRAIN_SECONDS_MAX: Final = 40.0
FRAMES_IN_FLIGHT: Final = 4
LETTERS_MAX: Final = 1_000
TRANSACTIONS_MAX: Final = 1_000
DELAYED_SHARE: Final = 0.05
UNSENT_MAX: Final = 400
"""Messages of unknown outcome a producer keeps to send again."""


class Temper(NamedTuple):
    """Chances, per message or per read, of what a consumer does instead of an ack."""

    fail: float = 0.0
    fail_later: float = 0.0
    reject: float = 0.0
    hand_back: float = 0.0
    forget: float = 0.0
    hold: float = 0.0
    drop: float = 0.0
    goodbye: float = 0.0


CALM: Final = Temper(hold=0.02, drop=0.002)
FUSSY: Final = Temper(
    fail=0.08, fail_later=0.03, reject=0.02, hand_back=0.03, forget=0.002, hold=0.05, drop=0.02, goodbye=0.02
)
SLOW: Final = Temper(fail=0.02, hold=0.8, drop=0.005)


@dataclass
class Load:
    """What the tasks of one run share."""

    port: int
    history: History
    messages_max: int
    drain: bool = False
    """Producers stop; consumers ack everything."""
    stop: bool = False
    sent: int = 0
    letters_left: int = LETTERS_MAX // 2
    """How many messages may still be made dead letters, for one answer lists at most LETTERS_MAX."""
    host: str = "127.0.0.1"
    digest: Callable[[bytes], str] = digest_of
    silence_max: float = float("inf")
    """Seconds after which a consumer gives up a broker that says nothing."""


async def _reconnect(load: Load, group: str, bindings: Iterable[Binding] = ()) -> DriverConnection | None:
    while not load.stop:
        try:
            connection = await open_connection(load.port, group, load.history, bindings=list(bindings), host=load.host)
        except Lost:
            await trio.sleep(RECONNECT_SECONDS)
        else:
            connection.digest = load.digest
            return connection
    return None


# --- producers ----------------------------------------------------------------------------------


def _new_message(load: Load, random: Random) -> Message:
    topic = random.choice(("orders", "events"))
    kind = random.choices(("x.a", "x.b", "y", "poison"), (18, 9, 9, load.letters_left > 0))[0]
    load.letters_left -= kind == "poison"
    limit = random.choice((1, 3)) if kind == "poison" else 100
    body = random.randbytes(random.choice((0, 20, 200, 2_000)))
    delay = random.choice((0.05, 0.4, 1.5)) if random.random() < DELAYED_SHARE else 0
    return Message(topic, kind, body, deliver_limit=limit, delay=delay)


async def produce(load: Load, group: str, seed: str) -> None:
    """Publish frames of several messages, some repeated; what had no answer is sent again."""
    random = Random(seed)
    again: deque[Message] = deque()
    while not load.stop:
        connection = await _reconnect(load, group)
        if connection is None:
            return
        calls: dict[str, Message] = {}
        try:
            while again or not load.drain:
                frame = [again.popleft() for _ in range(min(len(again), 8))]
                if not frame and load.sent < load.messages_max:
                    frame = [_new_message(load, random) for _ in range(random.randint(1, 24))]
                    load.sent += len(frame)
                if frame:
                    calls |= dict(zip(await connection.publish(frame), frame, strict=True))
                if calls and random.random() < 0.02:
                    repeated = random.sample(list(calls.values()), min(3, len(calls)))
                    calls |= dict(zip(await connection.publish(repeated), repeated, strict=True))
                while connection.unanswered >= FRAMES_IN_FLIGHT or (load.drain and connection.unanswered):
                    await connection.receive()
                _forget_answered(connection, calls, again)
                await trio.sleep(random.random() * 0.01)
            await connection.answered()
            await connection.goodbye()
            return
        except Lost:
            _forget_answered(connection, calls, again)
            again.extend(list(calls.values())[:UNSENT_MAX])


def _forget_answered(connection: DriverConnection, calls: dict[str, Message], again: deque[Message]) -> None:
    for call, receipt in connection.receipts.items():
        message = calls.pop(call)
        if not isinstance(receipt, PublishOk):
            again.append(message)
    connection.receipts.clear()


# --- consumers ----------------------------------------------------------------------------------


async def consume(load: Load, group: str, bindings: list[Binding], temper: Temper, seed: str) -> None:
    """Take messages, with all the faults of a temper, until the run stops."""
    random = Random(seed)
    while not load.stop:
        connection = await _reconnect(load, group, bindings)
        if connection is None:
            return
        with suppress(Lost):
            await _consume_on(connection, load, temper, random)


async def _consume_on(connection: DriverConnection, load: Load, temper: Temper, random: Random) -> None:
    held: list[tuple[float, int]] = []
    extended = time.monotonic()
    await connection.credit(random.choice((8, 64, 256)))
    while not load.stop:
        arrived: list[Arrival] = []
        with trio.move_on_after(0.05):
            arrived = await connection.receive()
        await connection.stay_sure(load.silence_max)
        acks = [
            arrival.tag
            for arrival in arrived
            if load.drain or not await _misbehave(connection, arrival, load, temper, random, held)
        ]
        now = time.monotonic()
        acks += [tag for due, tag in held if due <= now or load.drain]
        held = [(due, tag) for due, tag in held if due > now and not load.drain]
        if held and now >= extended + EXTEND_SECONDS:
            extended = now
            await connection.extend([tag for _, tag in held])
        if len(acks) > 2 and random.random() < 0.1:
            random.shuffle(acks)
            half = len(acks) // 2
            await connection.ack(acks[half:])
            acks = acks[:half]
        if acks:
            await connection.ack(acks)
        if not load.drain and random.random() < temper.drop:
            await connection.drop()
            return
        if connection.left or (not load.drain and random.random() < temper.goodbye):
            await connection.goodbye()
            return
    await connection.answered()
    await connection.goodbye()


async def _misbehave(
    connection: DriverConnection,
    arrival: Arrival,
    load: Load,
    temper: Temper,
    random: Random,
    held: list[tuple[float, int]],
) -> bool:
    """Do something else than to ack a message at once, by the temper's chances; return whether it was done."""
    if b"\xa6poison" in arrival.blob[:64]:
        await connection.nack([arrival.tag])
        return True
    if connection.left and random.random() < 0.5:
        return False
    chance = random.random()
    for limit, how, after_ms in (
        (temper.fail, NACK_FAILED, None),
        (temper.fail_later, NACK_FAILED, random.randint(50, 1_500)),
        (temper.reject * (load.letters_left > 0), NACK_REJECTED, None),
        (temper.hand_back, NACK_UNSTARTED, None),
    ):
        if chance < limit:
            load.letters_left -= how == NACK_REJECTED
            await connection.nack([arrival.tag], how, after_ms)
            return True
        chance -= limit
    if chance < temper.forget:
        return True
    chance -= temper.forget
    if chance < temper.hold:
        held.append(
            (time.monotonic() + random.random() * (HOLD_SECONDS_MAX if random.random() < 0.01 else 0.3), arrival.tag)
        )
        return True
    return False


# --- the end ------------------------------------------------------------------------------------


async def drain(load: Load) -> bool:
    """Let the consumers take what is left; return whether nothing was left before time was up."""
    load.drain = True
    connection = await _reconnect(load, "inspector")
    assert connection is not None
    complete, quiet = False, 0
    with trio.move_on_after(DRAIN_SECONDS_MAX):
        while quiet < 2:
            quiet = 0 if await count_left(connection) else quiet + 1
            await trio.sleep(0.2)
        complete = True
    load.history.write(Drained(time.monotonic(), complete))
    await final_state(connection, load.history)
    await connection.goodbye()
    return complete


async def count_left(connection: DriverConnection) -> int:
    """Return how many messages and transactions the broker has not done with."""
    rows = await connection.admin("group.list")
    left = sum(row["pending"] + row["in_flight"] + row["retrying"] for row in rows)
    left += (await connection.admin("stat"))["delayed"]["messages"]
    left += len(await connection.admin("tx.list", limit=1))
    return int(left)


async def note_waiting(connection: DriverConnection, history: History) -> None:
    """Note what the broker says in the middle of a run."""
    for row in await connection.admin("group.list"):
        waiting = row["pending"] + row["in_flight"] + row["retrying"] + row["dead"]
        history.write(Waiting(time.monotonic(), row["group"], row["topic"], waiting))


async def final_state(connection: DriverConnection, history: History) -> None:
    """Note what the broker says about its transactions, its groups and their dead letters."""
    transactions = await connection.admin("tx.list", limit=TRANSACTIONS_MAX)
    assert len(transactions) < TRANSACTIONS_MAX, "more undecided transactions than one answer lists"
    for row in transactions:
        identity = row["id"].hex() if isinstance(row["id"], bytes) else row["id"]
        history.write(FinalTransaction(time.monotonic(), identity, row["state"]))
    rows = await connection.admin("group.list")
    for row in rows:
        numbers = (row["pending"], row["in_flight"], row["retrying"], row["dead"])
        history.write(FinalGroup(time.monotonic(), row["group"], row["topic"], *numbers))
    for group, topic in [(row["group"], row["topic"]) for row in rows]:
        letters = await connection.admin("dlq.list", group=group, topic=topic, limit=LETTERS_MAX)
        assert len(letters) < LETTERS_MAX, "more dead letters than one answer lists: send fewer poisonous messages"
        for row in letters:
            identity = row["id"].hex() if isinstance(row["id"], bytes) else row["id"]
            what = (row["topic"], identity, row["message_type"], row["reason"], row["attempts"])
            history.write(FinalDead(time.monotonic(), group, *what))
