"""Brokers of a cluster die, stand still and leave under load; nothing that a program was told is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.running import PATIENT_TIMEOUT, SEND_TIMEOUT, running
from tests.support.cluster import SESSION_SECONDS

pytestmark = pytest.mark.slow

SOME = 200
AWAY_SECONDS = 2 * SEND_TIMEOUT

assert AWAY_SECONDS > SESSION_SECONDS


def test_nothing_is_lost_when_brokers_are_killed_and_return_at_once(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        _, second, third = run.cluster.brokers
        run.accept(SOME)
        for broker in (second, third, second):
            run.kill(broker)
            run.start(broker)
            run.accept(SOME // 4, by=broker)
        run.cluster.wait_registered()
        run.finish()


@pytest.mark.parametrize(
    "seconds", [AWAY_SECONDS, *(pytest.param(long, marks=pytest.mark.long) for long in (120, 600))]
)
def test_nothing_is_lost_when_one_broker_of_three_is_dead_for_long(tmp_path: Path, seconds: float) -> None:
    with running(tmp_path) as run:
        first, second, third = run.cluster.brokers
        run.accept(SOME)
        run.kill(second)
        run.cluster.wait_registered([first, third])
        run.go_on(seconds)
        run.start(second)
        run.accept(SOME // 4, by=second)
        run.finish()


@pytest.mark.parametrize(
    "seconds", [AWAY_SECONDS, *(pytest.param(long, marks=pytest.mark.long) for long in (120, 600))]
)
def test_a_broker_that_stood_still_longer_than_its_session_goes_on(tmp_path: Path, seconds: float) -> None:
    with running(tmp_path) as run:
        first, second, third = run.cluster.brokers
        run.accept(SOME)
        with run.paused_broker(second):
            run.cluster.wait_registered([first, third])
            run.go_on(seconds)
        run.cluster.wait_registered()
        run.accept(SOME // 4, by=second)
        run.finish()


def test_brokers_restarted_one_after_the_other_cost_no_program_an_error(tmp_path: Path) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT) as run:
        run.accept(SOME)
        for broker in run.cluster.brokers:
            run.drain(broker)
            run.accept(SOME // 4)
            run.start(broker)
            run.accept(SOME // 4, by=broker)
        run.cluster.wait_registered()
        report = run.finish()
        assert report.errors == []
        assert {group.again for group in report.repeated} == {0}


def test_a_broker_that_joins_knows_the_groups_and_is_used_at_once(tmp_path: Path) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT, later=1) as run:
        *_, third = run.cluster.brokers
        run.accept(SOME)
        run.start(third)
        run.accept(SOME // 4, by=third)  # the judgement sees to it that its first receipt counts all groups
        assert run.finish().errors == []
