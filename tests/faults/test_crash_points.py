"""Every named step of a transaction, and who dies there: the broker, the producer, or both.

In each case five transactions of different shapes are on their way at once (see `crashing_producer.SHAPES`), such as
end in a commit, or such as end in a rollback. Then everything is started again, and must agree: the business
row is there if, and only if, every message was delivered to every group. Each test is one step with all victims,
one after the other on the same store. The broker dies on the way to both ends, the others on the way to one of them,
which alternates from step to step; the random crashes do it in all ways.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random, SystemRandom
from typing import Final, NamedTuple

import pytest
import trio

from tests.faults.crash import Crash, crashing
from tests.faults.crashing_producer import SHAPES, Round
from tests.faults.trap import BROKER, PRODUCER, set_trap

pytestmark = pytest.mark.slow

VICTIMS: Final = ((BROKER,), (PRODUCER,), (BROKER, PRODUCER))
AWAY: Final = (
    "half-arrived", "half-durable", "part-arrived", "part-durable", "row-written", "decision-made",
    "decision-arrived", "decision-durable",
)  # fmt: skip
"""Steps at which the client waits for the broker, or soon will."""
CLIENT_TIMEOUT: Final = 0.3
RECOVERY: Final = ("recovering", "recovered")


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


CRASHES: Final = [(victims, commit) for victims in VICTIMS for commit in (True, False)]


def _crashes(number: int) -> list[tuple[tuple[str, ...], bool]]:
    """Return those of the step with this number."""
    odd = number % 2
    return [*CRASHES[:2], CRASHES[2 + odd], CRASHES[5 - odd]]


async def _crash(crash: Crash, step: Step, victims: tuple[str, ...], *, commit: bool) -> None:
    round_ = Round(commit, silent=step.silent, unsure=step.unsure, check_after=0.2 if step.silent else 0.3)
    await crash.spring(step.point, victims, commit if step.decided else None, round_)
    await crash.restart()
    await crash.agree()


async def _crash_of_recovery(crash: Crash, point: str, victims: tuple[str, ...], *, commit: bool) -> None:
    await crash.play(Round(commit, silent=True, check_after=0.5))
    await crash.kill_broker()
    set_trap(crash.folder, point, victims)
    await crash.start_in_vain()
    await crash.wait_sprung(point, victims)
    await crash.restart()
    await crash.agree()


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name.replace(" ", "-"))
async def test_everything_agrees_after_a_crash(tmp_path: Path, step: Step) -> None:
    async with crashing(tmp_path) as crash:
        for victims, commit in _crashes(STEPS.index(step)):
            await _crash(crash, step, victims, commit=commit)


@pytest.mark.parametrize("point", RECOVERY)
async def test_everything_agrees_after_a_crash_of_the_recovery(tmp_path: Path, point: str) -> None:
    async with crashing(tmp_path) as crash:
        for victims, commit in _crashes(RECOVERY.index(point)):
            await _crash_of_recovery(crash, point, victims, commit=commit)


@pytest.mark.parametrize("point", ["trim-arrived", "trim-durable"])
async def test_everything_agrees_after_a_crash_while_old_decisions_go(tmp_path: Path, point: str) -> None:
    async with crashing(tmp_path, keep_seconds=0.5) as crash:
        for victims, commit in CRASHES:
            await crash.play(Round(commit))
            set_trap(tmp_path, point, victims)
            await crash.wait_sprung(point, victims)
            await crash.restart()
            await crash.agree()


@pytest.mark.parametrize("commit", [True, False])
async def test_everything_agrees_when_the_broker_is_away_for_longer_than_clients_wait(
    tmp_path: Path, commit: bool
) -> None:
    async with crashing(tmp_path, timeout=CLIENT_TIMEOUT) as crash:
        for point in AWAY:
            await crash.spring(point, (BROKER,), commit if point.startswith("decision") else None, Round(commit))
            await trio.sleep(3 * CLIENT_TIMEOUT)
            await crash.restart()
            await crash.agree()


async def test_nothing_undecided_is_seen_while_its_producer_is_away(tmp_path: Path) -> None:
    async with crashing(tmp_path) as crash:
        await crash.spring("local-over", (BROKER, PRODUCER), None, Round(commit=True))
        await crash.start_broker()
        inspector = await crash.inspector()
        with trio.move_on_after(1.0):
            while True:
                assert len(await inspector.admin("tx.list", state="open")) == len(SHAPES)
                rows = await inspector.admin("group.list")
                assert {(row["pending"], row["in_flight"], row["retrying"], row["dead"]) for row in rows} == {(0,) * 4}
                await trio.sleep(0.05)
        await inspector.goodbye()
        assert not any(crash.seen.values())
        crash.producer.start()
        await crash.agree()
        assert all(crash.seen.values())


@pytest.mark.long
async def test_everything_agrees_after_many_random_crashes(tmp_path: Path) -> None:
    """KITEQ_FAULTS_SEED=n repeats a run's choices, KITEQ_FAULTS_ROUNDS=n makes n crashes."""
    seed = int(os.environ.get("KITEQ_FAULTS_SEED", SystemRandom().randrange(1 << 32)))
    print(f"seed {seed}")  # noqa: T201 pytest shows it when the test fails
    random = Random(seed)
    async with crashing(tmp_path) as crash:
        for _ in range(int(os.environ.get("KITEQ_FAULTS_ROUNDS", "300"))):
            victims, commit = random.choice(CRASHES)
            if random.random() < 0.2:
                await _crash_of_recovery(crash, random.choice(RECOVERY), victims, commit=commit)
            else:
                await _crash(crash, random.choice(STEPS), victims, commit=commit)
