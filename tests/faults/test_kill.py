"""The broker is killed at random moments under load; what producers and consumers saw must be allowed.

KITEQ_FAULTS_SEED=n repeats a run's choices (not its timing); KITEQ_FAULTS_ROUNDS=n kills n times.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

import pytest
import trio

from kiteq.binding.bindings import Binding, direct, fanout, regex
from tests.faults.checker import check
from tests.faults.history import BrokerStarted, BrokerStopped, Event, History, Run, read_histories
from tests.faults.load import CALM, FUSSY, SLOW, Load, Temper, consume, drain, produce
from tests.faults.load_transactions import TOPICS, Ledger, transact
from tests.faults.patching import PACKAGE_PARENT, hurried_copy
from tests.support.broker import BrokerFailed, BrokerProcess

pytestmark = pytest.mark.slow

ACK_DEADLINE: Final = 3.0
MESSAGES_PER_ROUND: Final = 1_500
RUN_SECONDS_MAX: Final = 120.0

CONSUMERS: Final[list[tuple[str, list[Binding], Temper]]] = [
    ("calm", [fanout("orders"), fanout("events")], CALM),
    ("calm", [fanout("orders"), fanout("events")], CALM),
    ("fussy", [regex("orders", r"x\..*"), direct("orders", "poison"), direct("events", "y")], FUSSY),
    ("fussy", [regex("orders", r"x\..*"), direct("orders", "poison"), direct("events", "y")], FUSSY),
    ("slow", [direct("events", "x.a"), direct("orders", "y")], SLOW),
]
PRODUCERS: Final = ["billing", "billing", "shop"]
TRANSACTORS: Final = [("bank", TOPICS), ("bank", TOPICS[1:]), ("fund", TOPICS)]


async def _kill_and_restart(broker: BrokerProcess, history: History, random: Random) -> None:
    """One round: some load, the end of the broker, and its return; at times it is killed while it returns."""
    await trio.sleep(0.2 + random.random() * 0.8)
    began = time.monotonic()
    graceful = random.random() < 0.15
    await trio.to_thread.run_sync(broker.stop if graceful else broker.kill)
    history.write(BrokerStopped(time.monotonic(), began, "stopped" if graceful else "killed"))
    while random.random() < 0.25:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_start_in_vain, broker)
            await trio.sleep(random.random() * 0.6)
            began = time.monotonic()
            if broker.is_running:
                await trio.to_thread.run_sync(broker.kill)
        history.write(BrokerStopped(time.monotonic(), began, "killed at start"))
    await trio.to_thread.run_sync(broker.start)
    history.write(BrokerStarted(time.monotonic()))


async def _start_in_vain(broker: BrokerProcess) -> None:
    try:
        await trio.to_thread.run_sync(broker.start)
    except BrokerFailed:
        return
    await trio.to_thread.run_sync(broker.close)


async def _run(broker: BrokerProcess, history: History, seed: int, rounds: int) -> bool:
    random = Random(seed)
    load = Load(broker.port, history, messages_max=MESSAGES_PER_ROUND * (rounds + 1))
    ledgers = {group: Ledger(group) for group, _ in TRANSACTORS}
    history.write(Run(time.monotonic(), ACK_DEADLINE))
    async with broker:
        history.write(BrokerStarted(time.monotonic()))
        async with trio.open_nursery() as nursery:
            for number, (group, bindings, temper) in enumerate(CONSUMERS):
                nursery.start_soon(consume, load, group, bindings, temper, f"{seed}-consumer-{number}")
            for number, (group, topics) in enumerate(TRANSACTORS):
                nursery.start_soon(transact, load, ledgers[group], f"{seed}-transactor-{number}", topics)
            async with trio.open_nursery() as producing:
                for number, group in enumerate(PRODUCERS):
                    producing.start_soon(produce, load, group, f"{seed}-producer-{number}")
                for _ in range(rounds):
                    load.messages_max = load.sent + MESSAGES_PER_ROUND
                    await _kill_and_restart(broker, history, random)
                load.drain = True
            complete = await drain(load)
            load.stop = True
    for ledger in ledgers.values():
        history.write(*ledger.outcomes())
    return complete


def _report(events: list[Event]) -> str:
    counted = Counter(type(event).__name__ for event in events)
    return ", ".join(f"{name} {number}" for name, number in sorted(counted.items()))


async def _judge(folder: Path, rounds: int, *, hurried: bool) -> None:
    seed = int(os.environ.get("KITEQ_FAULTS_SEED", SystemRandom().randrange(1 << 32)))
    print(f"seed {seed}, {rounds} rounds")  # noqa: T201 pytest shows it when the test fails
    (folder / "broker").mkdir()
    package_parent = hurried_copy(folder) if hurried else PACKAGE_PARENT
    environment = {
        "PYTHONPATH": str(package_parent),
        "KITEQ_ACK_DEADLINE": f"{ACK_DEADLINE}s",
        "KITEQ_CHECK_AFTER": "0.2s",
        "KITEQ_CHECK_ELSEWHERE_AFTER": "0.5s",
    }
    broker = BrokerProcess(folder / "broker", environment=environment)
    path = folder / "history.jsonl"
    with History(path) as history, trio.fail_after(RUN_SECONDS_MAX + 5 * rounds):
        complete = await _run(broker, history, seed, rounds)
    events = read_histories([path])
    print(_report(events))  # noqa: T201 pytest shows it when the test fails
    assert [str(violation) for violation in check(events)] == []
    assert complete, "the groups were not drained in time"
    assert sum(isinstance(event, BrokerStopped) for event in events) >= rounds


@pytest.mark.parametrize("hurried", [False, True])
async def test_nothing_promised_is_broken_by_kills_under_load(tmp_path: Path, hurried: bool) -> None:
    await _judge(tmp_path, int(os.environ.get("KITEQ_FAULTS_ROUNDS", "6")), hurried=hurried)


@pytest.mark.long
@pytest.mark.parametrize("hurried", [False, True])
async def test_nothing_promised_is_broken_by_many_kills(tmp_path: Path, hurried: bool) -> None:
    await _judge(tmp_path, int(os.environ.get("KITEQ_FAULTS_ROUNDS", "100")), hurried=hurried)
