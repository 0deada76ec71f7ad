"""The line between programs and one broker is cut; the others are used, and nothing that was told is broken."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.running import PATIENT_TIMEOUT, SEND_TIMEOUT, running
from tests.faults.patching import hurried_copy

pytestmark = pytest.mark.slow

SOME = 200
HURRIED = (("kiteq/limits.py", "HEARTBEAT_SECONDS", "0.5"), ("kiteq/limits.py", "IDLE_SECONDS_MAX", "2.0"))
"""A silent line is noticed by both sides well within a cut."""
CUT_SECONDS = 2 * SEND_TIMEOUT
STILL_SECONDS = 3.0
"""Longer than the brokers wait for a sign of life."""
CUTS = [CUT_SECONDS, *(pytest.param(long, marks=pytest.mark.long) for long in (120, 600))]


@pytest.mark.parametrize("seconds", CUTS)
@pytest.mark.parametrize("direction", ["both", "requests", "answers"])
def test_nothing_is_lost_when_a_broker_cannot_be_reached(tmp_path: Path, direction: str, seconds: float) -> None:
    with running(tmp_path, package=hurried_copy(tmp_path, HURRIED)) as run:
        _, second, _ = run.cluster.brokers
        run.accept(SOME)
        with run.out_of_reach(second, requests=direction != "answers", answers=direction != "requests"):
            run.go_on(seconds)
        run.accept(SOME // 4, by=second)
        run.finish()


def test_who_waits_long_enough_gets_every_answer_from_the_broker_that_was_asked(tmp_path: Path) -> None:
    with running(tmp_path, timeout=PATIENT_TIMEOUT, package=hurried_copy(tmp_path, HURRIED)) as run:
        _, second, _ = run.cluster.brokers
        run.accept(SOME)
        with run.out_of_reach(second, requests=False):
            time.sleep(STILL_SECONDS)  # every producer soon waits for this broker
        run.accept(SOME // 4, by=second)
        assert run.finish().errors == []


def test_programs_that_stood_still_until_they_were_given_up_go_on(tmp_path: Path) -> None:
    with running(tmp_path, package=hurried_copy(tmp_path, HURRIED)) as run:
        run.accept(SOME)
        with run.paused():
            time.sleep(STILL_SECONDS)
        for broker in run.cluster.brokers:
            run.accept(SOME // 4, by=broker)
        run.finish()


def test_nothing_is_lost_on_a_line_that_comes_and_goes(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.accept(SOME)
        for broker in run.cluster.brokers:
            with run.out_of_reach(broker):
                run.go_on(0.7)
            run.go_on(0.3)
        for broker in run.cluster.brokers:
            run.accept(SOME // 4, by=broker)
        run.finish()
