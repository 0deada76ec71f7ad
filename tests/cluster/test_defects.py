"""Seeded defects of clusters are caught: each patch of `defects/` breaks a promise, which a run must show.

A patch that no longer applies is a failure here: bring it up to date with the code it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.cluster import test_brokers_fail, test_lines_are_cut, test_zookeeper_fails
from tests.cluster.running import CHANGED, OUTAGE_SECONDS
from tests.faults.patching import patched_copy

pytestmark = pytest.mark.slow

DEFECTS: Final = Path(__file__).parent / "defects"
PACKAGES: Final = ("kiteq", "client/kiteq_client")


class Defect(NamedTuple):
    """A patch, the test that shows it, and what that says."""

    patch: str
    shown_by: Callable[[Path], None]
    says: str


SEEDED: Final = (
    Defect(
        "registry-not-applied",
        test_brokers_fail.test_a_broker_that_joins_knows_the_groups_and_is_used_at_once,
        r"I1 \w+: the receipt says",
    ),
    Defect(
        "bindings-not-brought-back",
        test_zookeeper_fails.test_all_brokers_start_again_at_a_zookeeper_that_has_lost_everything,
        "books-bind",
    ),
    Defect(
        "announced-once",
        lambda folder: test_zookeeper_fails.test_a_broker_cut_off_from_zookeeper_goes_on_and_is_announced_again(
            folder, OUTAGE_SECONDS
        ),
        "announced are",
    ),
    Defect(
        "clients-sent-away-in-an-outage",
        lambda folder: test_zookeeper_fails.test_nobody_notices_that_zookeeper_stands_still(folder, OUTAGE_SECONDS),
        "connections ended",
    ),
    Defect(
        "draining-told-to-the-program",
        test_brokers_fail.test_brokers_restarted_one_after_the_other_cost_no_program_an_error,
        "draining",
    ),
    Defect(
        "sent-again-to-another",
        test_lines_are_cut.test_who_waits_long_enough_gets_every_answer_from_the_broker_that_was_asked,
        "I2 .*nobody published it",
    ),
)


@pytest.mark.parametrize("defect", SEEDED, ids=lambda defect: defect.patch)
def test_every_patch_applies(defect: Defect, tmp_path: Path) -> None:
    patched_copy(tmp_path, DEFECTS / f"{defect.patch}.patch", *PACKAGES)


@pytest.mark.long
@pytest.mark.parametrize("defect", SEEDED, ids=lambda defect: defect.patch)
def test_a_seeded_defect_is_caught(defect: Defect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    changed = patched_copy(tmp_path, DEFECTS / f"{defect.patch}.patch", *PACKAGES)
    monkeypatch.setenv(CHANGED, str(changed))
    with pytest.raises(AssertionError, match=defect.says):
        defect.shown_by(tmp_path / "run")


def test_every_patch_is_used() -> None:
    assert {path.stem for path in DEFECTS.glob("*.patch")} == {defect.patch for defect in SEEDED}
