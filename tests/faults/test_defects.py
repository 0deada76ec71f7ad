"""The checker catches seeded defects: each patch of `defects/` breaks one promise, which must be named.

A patch that no longer applies is a failure here: bring it up to date with the code it changes.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final, NamedTuple

import pytest
import trio

from tests.faults import scenarios
from tests.faults import transaction_scenarios as halves
from tests.faults.checker import Violation, check
from tests.faults.driver import Lost
from tests.faults.history import History, Run, read_histories
from tests.faults.patching import PACKAGE_PARENT, patched_copy
from tests.faults.scenarios import ACK_DEADLINE, CHECK_LIMIT, SCENARIOS, Scenario, Stage
from tests.faults.transaction_scenarios import TRANSACTION_SCENARIOS
from tests.support.broker import BrokerFailed, BrokerProcess

pytestmark = pytest.mark.slow

DEFECTS: Final = Path(__file__).parent / "defects"
RUN_SECONDS_MAX: Final = 60.0


class Defect(NamedTuple):
    """A patch, the invariant it breaks, and the scenario that shows it."""

    patch: str
    invariant: str
    scenario: Scenario


SEEDED: Final = (
    Defect("reply-before-commit", "I1", scenarios.kill_after_receipt),
    Defect("ack-lost", "I9", scenarios.kill_after_acks_of_half_a_record),
    Defect("settlement-before-its-message", "I10", scenarios.kill_after_rejection),
    Defect("lease-given-twice", "I11", scenarios.two_members),
    Defect("crc-ignored", "I2", scenarios.damage_on_the_disk),
    Defect("floor-moved-past-a-hole", "I10", scenarios.kill_after_acks_out_of_order),
    Defect("duplicate-window-not-rebuilt", "I14", scenarios.send_again_after_restart),
    Defect("retry-dropped-on-restart", "I10", scenarios.kill_while_a_retry_waits),
    Defect("attempts-forgotten-on-restart", "I10", scenarios.kill_after_several_failures),
    Defect("regex-not-anchored", "I2", scenarios.bound_to_neighbours),
    Defect("bindings-forgotten-on-restart", "I1", scenarios.kill_after_binding),
    Defect("memory-given-up-out-of-order", "I11", scenarios.leave_out_of_order),
    Defect("memory-given-up-during-a-read", "I1", scenarios.leave_while_the_log_is_read),
    Defect("dead-letters-not-counted", "I22", scenarios.kill_after_rejection),
    Defect("delivered-when-prepared", "I3", halves.undecided_for_a_while),
    Defect("half-counted-as-backlog", "I3", halves.undecided_for_a_while),
    Defect("half-answered-before-durable", "I7", halves.kill_after_prepare),
    Defect("rollback-forgotten-on-restart", "I4", halves.kill_after_some_of_a_row_were_rolled_back),
    Defect("rollback-answered-before-durable", "I4", halves.kill_after_rollback),
    Defect("commit-answered-before-durable", "I6", halves.kill_after_commit),
    Defect("commit-accepted-after-rollback", "I4", halves.commit_after_rollback),
    Defect("decided-by-a-stranger", "I7", halves.decided_by_a_stranger),
    Defect("wrong-group-asked", "I7", halves.asked_while_strangers_are_there),
    Defect("member-without-the-topics-asked", "I7", halves.asked_while_strangers_are_there),
    Defect("rolled-back-at-the-last-check", "I7", halves.unknown_to_the_last_check),
    Defect("budget-used-up-by-running", "I7", halves.running_for_long),
    Defect("added-message-lost-on-restart", "I8", halves.kill_after_more_was_added),
    Defect("decided-left-among-the-halves", "I4", halves.kill_after_tidying),
)


async def _play(scenario: Scenario, folder: Path, package_parent: Path, *, may_die: bool) -> list[Violation]:
    (folder / "broker").mkdir()
    environment = {
        "PYTHONPATH": f"{package_parent}:{PACKAGE_PARENT}",
        "KITEQ_ACK_DEADLINE": f"{ACK_DEADLINE}s",
        "KITEQ_CHECK_AFTER": "0.1s",
        "KITEQ_CHECK_ELSEWHERE_AFTER": "0.1s",
        "KITEQ_CHECK_LIMIT": str(CHECK_LIMIT),
    }
    path = folder / "history.jsonl"
    with History(path) as history, trio.fail_after(RUN_SECONDS_MAX):
        history.write(Run(time.monotonic(), ACK_DEADLINE, check_limit=CHECK_LIMIT))
        # Nothing is trapped here; what tidies up does so more often than in the product.
        broker = BrokerProcess(folder / "broker", environment=environment, module="tests.faults.crashing_broker")
        stage = Stage(broker, history)
        try:
            await stage.start()
            await scenario(stage)
            await stage.finish()
        except* (Lost, BrokerFailed):
            if not may_die:
                raise
        finally:
            stage.broker.close()
    return check(read_histories([path]))


@pytest.mark.parametrize("scenario", SCENARIOS + TRANSACTION_SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_the_broker_keeps_its_promises(scenario: Scenario, tmp_path: Path) -> None:
    violations = await _play(scenario, tmp_path, PACKAGE_PARENT, may_die=False)
    assert [str(violation) for violation in violations] == []


@pytest.mark.parametrize("defect", SEEDED, ids=lambda defect: defect.patch)
async def test_a_seeded_defect_is_caught_and_its_invariant_named(defect: Defect, tmp_path: Path) -> None:
    parent = patched_copy(tmp_path, DEFECTS / f"{defect.patch}.patch")
    violations = await _play(defect.scenario, tmp_path, parent, may_die=True)
    assert defect.invariant in {violation.invariant for violation in violations}, [str(one) for one in violations]


def test_every_patch_is_used() -> None:
    assert {path.stem for path in DEFECTS.glob("*.patch")} == {defect.patch for defect in SEEDED}
