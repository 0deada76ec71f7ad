"""Faults of every kind, some at once and in any order, as a seed chooses.

KITEQ_FAULTS_SEED=n repeats a run's choices (not its timing); KITEQ_FAULTS_ROUNDS=n has n rounds of faults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from random import Random, SystemRandom

import pytest

from tests.cluster.running import Run, running
from tests.support.cluster import ClusterBroker

pytestmark = pytest.mark.slow

SOME = 100
ROUND_SECONDS_MAX = 4.0
DIRECTIONS = ((True, True), (True, False), (False, True))
"""Of what is dropped: requests, answers."""

Fault = Callable[[Run, ClusterBroker, Random], AbstractContextManager[None]]


@contextmanager
def killed(run: Run, broker: ClusterBroker, random: Random) -> Iterator[None]:
    run.kill(broker)
    yield
    run.start(broker)


@contextmanager
def drained(run: Run, broker: ClusterBroker, random: Random) -> Iterator[None]:
    run.drain(broker)
    yield
    run.start(broker)


@contextmanager
def paused(run: Run, broker: ClusterBroker, random: Random) -> Iterator[None]:
    with run.paused_broker(broker):
        yield


@contextmanager
def out_of_reach(run: Run, broker: ClusterBroker, random: Random) -> Iterator[None]:
    requests, answers = random.choice(DIRECTIONS)
    with run.out_of_reach(broker, requests=requests, answers=answers):
        yield


@contextmanager
def without_zookeeper(run: Run, broker: ClusterBroker, random: Random) -> Iterator[None]:
    requests, answers = random.choice(DIRECTIONS)
    host = broker.zookeeper_host
    with run.cluster.network.cut(to=host if requests else "", answers_of=host if answers else ""):
        yield


@contextmanager
def zookeeper_killed(run: Run, random: Random) -> Iterator[None]:
    [zookeeper] = run.cluster.nodes
    zookeeper.kill()
    if random.random() < 0.5:
        zookeeper.wipe()
    yield
    run.cluster.start_zookeeper()


@contextmanager
def zookeeper_paused(run: Run, random: Random) -> Iterator[None]:
    with run.cluster.zookeeper_paused():
        yield


OF_BROKERS: tuple[Fault, ...] = (killed, drained, paused, out_of_reach, without_zookeeper)
OF_ZOOKEEPER = (zookeeper_killed, zookeeper_paused)


def _round(run: Run, random: Random) -> None:
    """Begin some faults, let one broker at least be in order, and end them one after the other."""
    faults: list[AbstractContextManager[None]] = []
    for broker in random.sample(run.cluster.brokers, random.randint(1, 2)):
        fault = random.choice(OF_BROKERS)
        print(f"{fault.__name__} {broker.number}")  # noqa: T201 shown when the test fails
        faults.append(fault(run, broker, random))
    if random.random() < 0.5:
        of_zookeeper = random.choice(OF_ZOOKEEPER)
        print(of_zookeeper.__name__)  # noqa: T201 shown when the test fails
        faults.append(of_zookeeper(run, random))
    random.shuffle(faults)
    with ExitStack() as stack:
        for fault_now in faults:
            stack.enter_context(fault_now)
            run.go_on(random.random() * ROUND_SECONDS_MAX / len(faults))
    run.accept(SOME)


def _rounds(folder: Path, rounds: int) -> None:
    seed = int(os.environ.get("KITEQ_FAULTS_SEED", SystemRandom().randrange(1 << 32)))
    print(f"seed {seed}, {rounds} rounds")  # noqa: T201 shown when the test fails
    random = Random(seed)
    with running(folder) as run:
        run.accept(SOME)
        for _ in range(rounds):
            _round(run, random)
        run.cluster.wait_registered()
        for broker in run.cluster.brokers:
            run.accept(SOME // 4, by=broker)
        run.finish()


def test_nothing_promised_is_broken_by_faults_at_the_same_time(tmp_path: Path) -> None:
    _rounds(tmp_path, int(os.environ.get("KITEQ_FAULTS_ROUNDS", "2")))


@pytest.mark.long
def test_nothing_promised_is_broken_by_many_faults(tmp_path: Path) -> None:
    _rounds(tmp_path, int(os.environ.get("KITEQ_FAULTS_ROUNDS", "60")))
