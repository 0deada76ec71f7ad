"""ZooKeeper fails, or is out of a broker's reach; what runs does not notice, and afterwards all is as it was."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.running import OUTAGE_SECONDS, PATIENT_TIMEOUT, running
from tests.support.cluster import SESSION_SECONDS

pytestmark = pytest.mark.slow

SOME = 200
LONG_SECONDS = (120, 600)
OUTAGES = [OUTAGE_SECONDS, *(pytest.param(long, marks=pytest.mark.long) for long in LONG_SECONDS)]
BOUND = {
    "orders": {"books-bind", "mail-bind", "ledger-bind", "audit-bind"},
    "events": {"books-bind", "audit-bind"},
}


def test_nobody_notices_that_the_leader_of_the_ensemble_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT, brokers=2, ensemble=True) as run:
        run.accept(SOME)
        began = time.monotonic()
        leader = run.cluster.leader()
        leader.kill()
        run.accept(SOME)
        assert run.cluster.leader() is not leader
        run.cluster.start_zookeeper()
        run.cluster.wait_registered()
        run.assert_undisturbed(began)
        assert run.finish().errors == []


@pytest.mark.parametrize("seconds", OUTAGES)
def test_nobody_notices_that_the_ensemble_has_lost_its_majority(tmp_path: Path, seconds: float) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT, brokers=2, ensemble=True) as run:
        run.accept(SOME)
        began = time.monotonic()
        for node in run.cluster.nodes[:2]:
            node.kill()
        run.go_on(seconds)
        run.cluster.start_zookeeper()
        run.cluster.wait_registered()
        run.assert_undisturbed(began)
        assert run.finish().errors == []


@pytest.mark.parametrize("seconds", OUTAGES)
def test_nobody_notices_that_zookeeper_stands_still(tmp_path: Path, seconds: float) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT, brokers=2) as run:
        run.accept(SOME)
        began = time.monotonic()
        with run.cluster.zookeeper_paused():
            run.go_on(seconds)
        run.cluster.wait_registered()
        run.assert_undisturbed(began)
        assert run.finish().errors == []


@pytest.mark.parametrize("seconds", OUTAGES)
def test_a_broker_restarted_without_zookeeper_serves_the_groups_it_knew(tmp_path: Path, seconds: float) -> None:
    with running(tmp_path) as run:
        first, second, _ = run.cluster.brokers
        [zookeeper] = run.cluster.nodes
        run.accept(SOME)
        zookeeper.kill()
        run.kill(first)
        run.start(first)
        run.accept(SOME // 4, by=first)  # the judgement sees to it that each receipt counts all groups
        run.drain(second)
        run.start(second)
        run.accept(SOME // 4, by=second)
        run.go_on(seconds)
        run.cluster.start_zookeeper()
        run.cluster.wait_registered()
        run.finish()


def test_nobody_is_unbound_when_zookeeper_has_lost_everything(tmp_path: Path) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT) as run:
        [zookeeper] = run.cluster.nodes
        run.accept(SOME)
        began = time.monotonic()
        zookeeper.kill()
        zookeeper.wipe()
        run.cluster.start_zookeeper()
        run.cluster.wait_registered()
        run.accept(SOME)
        assert run.cluster.registered().groups == BOUND
        run.assert_undisturbed(began)
        assert run.finish().errors == []


def test_all_brokers_start_again_at_a_zookeeper_that_has_lost_everything(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        [zookeeper] = run.cluster.nodes
        run.accept(SOME)
        for broker in run.cluster.brokers:
            run.kill(broker)
        zookeeper.kill()
        zookeeper.wipe()
        run.cluster.start_zookeeper()
        for broker in run.cluster.brokers:
            run.start(broker)
        run.cluster.wait_registered()
        assert run.cluster.registered().groups == BOUND
        for broker in run.cluster.brokers:
            run.accept(SOME // 4, by=broker)
        run.finish()


@pytest.mark.parametrize("seconds", OUTAGES)
def test_a_broker_cut_off_from_zookeeper_goes_on_and_is_announced_again(tmp_path: Path, seconds: float) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT) as run:
        first, second, third = run.cluster.brokers
        run.accept(SOME)
        began = time.monotonic()
        with run.cluster.network.cut(to=second.zookeeper_host, answers_of=second.zookeeper_host):
            run.cluster.wait_registered([first, third])
            run.go_on(seconds)
            run.accept(SOME // 4, by=second)
        run.cluster.wait_registered()
        run.assert_undisturbed(began)
        assert run.finish().errors == []


def test_a_broker_whose_line_to_zookeeper_comes_and_goes_in_one_direction(tmp_path: Path) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT) as run:
        first, second, third = run.cluster.brokers
        run.accept(SOME)
        began = time.monotonic()
        with run.cluster.network.cut(to=second.zookeeper_host):
            run.cluster.wait_registered([first, third])
        run.cluster.wait_registered()
        with run.cluster.network.cut(answers_of=second.zookeeper_host):
            run.go_on(3 * SESSION_SECONDS)
        run.cluster.wait_registered()
        for _ in range(5):
            with run.cluster.network.cut(to=second.zookeeper_host):
                run.go_on(SESSION_SECONDS / 2)
            run.go_on(SESSION_SECONDS / 2)
        run.cluster.wait_registered()
        run.assert_undisturbed(began)
        assert run.finish().errors == []
