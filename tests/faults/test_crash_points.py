"""Every named step of a transaction, and who dies there: the broker, the producer, or both.

In each case five transactions of different shapes are on their way at once (see `crashing_producer.SHAPES`), first
such as end in a commit, then such as end in a rollback. Then everything is started again, and must agree: the
business row is there if, and only if, every message was delivered to every group.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.faults.crash import crashing
from tests.faults.crashing_producer import Round
from tests.faults.trap import BROKER, PRODUCER, set_trap

pytestmark = pytest.mark.slow

VICTIMS: Final = ((BROKER,), (PRODUCER,), (BROKER, PRODUCER))
SILENT: Final = {"silent": True, "check_after": 0.2}


class Step(NamedTuple):
    """A step by name. point: of the trap. decided: whether the trap waits for a decision of the round's kind."""

    name: str
    point: str
    decided: bool = False
    silent: bool = False
    unsure: bool = False


STEPS: Final = (
    Step("before the half is durable", "half-arrived"),
    Step("while the half is written", "half-midway"),
    Step("half durable, not answered", "half-durable"),
    Step("half answered", "half-answered"),
    Step("before the local transaction", "block-entered"),
    Step("before an added message is durable", "part-arrived"),
    Step("added message durable, not answered", "part-durable"),
    Step("in the local transaction", "row-written"),
    Step("after the local transaction", "local-over"),
    Step("before the decision is sent", "decision-made", decided=True),
    Step("decision arrived", "decision-read", decided=True),
    Step("before the decision is durable", "decision-arrived", decided=True),
    Step("while the decision is written", "decision-midway", decided=True),
    Step("decision durable, not answered", "decision-durable", decided=True),
    Step("decision answered, not delivered", "decision-answered", decided=True),
    Step("delivered, not acked", "delivered"),
    Step("asked", "asked", silent=True),
    Step("in the check function", "checking", decided=True, silent=True),
    Step("before the check's answer is durable", "decision-arrived", decided=True, silent=True),
    Step("check's answer durable, not confirmed", "decision-durable", decided=True, silent=True),
    Step("check's answer confirmed", "decision-answered", decided=True, silent=True),
    Step("before an unsure answer is durable", "note-arrived", silent=True, unsure=True),
    Step("unsure answer durable", "note-durable", silent=True, unsure=True),
    Step("before half rows are rewritten", "rewrite-arrived", silent=True),
    Step("half rows rewritten", "rewrite-durable", silent=True),
    Step("rewriting noted", "clean-durable", silent=True),
)


@pytest.mark.parametrize("victims", VICTIMS, ids=" and ".join)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
async def test_everything_agrees_after_a_crash(tmp_path: Path, step: Step, victims: tuple[str, ...]) -> None:
    async with crashing(tmp_path) as crash:
        for commit in (True, False):
            round_ = Round(commit, silent=step.silent, unsure=step.unsure, check_after=0.2 if step.silent else 2.0)
            await crash.spring(step.point, victims, commit if step.decided else None, round_)
            await crash.restart()
            assert await crash.agree()


@pytest.mark.parametrize("victims", VICTIMS, ids=" and ".join)
@pytest.mark.parametrize("point", ["recovering", "recovered"])
async def test_everything_agrees_after_a_crash_of_the_recovery(
    tmp_path: Path, point: str, victims: tuple[str, ...]
) -> None:
    async with crashing(tmp_path) as crash:
        for commit in (True, False):
            await crash.play(Round(commit, silent=True, check_after=0.5))
            await crash.kill_broker()
            set_trap(tmp_path, point, victims)
            await crash.start_in_vain()
            await crash.wait_sprung(point, victims)
            await crash.restart()
            assert await crash.agree()


@pytest.mark.parametrize("victims", VICTIMS, ids=" and ".join)
@pytest.mark.parametrize("point", ["trim-arrived", "trim-durable"])
async def test_everything_agrees_after_a_crash_while_old_decisions_go(
    tmp_path: Path, point: str, victims: tuple[str, ...]
) -> None:
    async with crashing(tmp_path, keep_seconds=0.5) as crash:
        for commit in (True, False):
            await crash.play(Round(commit))
            set_trap(tmp_path, point, victims)
            await crash.wait_sprung(point, victims)
            await crash.restart()
            assert await crash.agree()
