"""Random interleavings of producers and checks: the business row is there exactly if the message is committed."""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from kiteq_client.decision import Decision
from kiteq_client.marker import Marker
from tests.marker import defects
from tests.marker.databases import Database
from tests.marker.schedule import Kind, Scenarios, Violation

SCENARIOS_OF_EACH_KIND = 400
"""Half of them are others in each run."""
SWALLOWING = 200
DEFECT_SCENARIOS_MAX = 2_000


def fresh_seed() -> int:
    return random.SystemRandom().randrange(2**32)


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_the_business_row_is_there_exactly_if_the_message_is_committed(database: Database, half: int) -> None:
    # In two halves, so that test processes share them: one with a seed of its own, one with the same always.
    with closing(Marker(database.own, lock_timeout=0)) as marker:
        scenarios = Scenarios(database, marker, fresh_seed() if half else 1)
        scenarios.run(list(Kind) * (SCENARIOS_OF_EACH_KIND // 2))
    assert scenarios.done == dict.fromkeys(Kind, SCENARIOS_OF_EACH_KIND // 2)
    answers = scenarios.broker.answers
    assert min(answers[decision] for decision in (Decision.COMMIT, Decision.ROLLBACK, Decision.RUNNING)) > 40


@pytest.mark.slow
def test_code_that_swallows_the_duplicate_commits_nothing(database: Database) -> None:
    kinds = [Kind.LATE_COMMIT, Kind.CHECK] * (SWALLOWING // 2)
    with closing(Marker(database.own, lock_timeout=0)) as marker:
        Scenarios(database, marker, fresh_seed(), swallows=True).run(kinds)


@pytest.mark.slow
@pytest.mark.parametrize(
    "defect", [defects.ReadsFirst, defects.LockMeansRollback, defects.IgnoresDuplicates, defects.CommitsBlindly]
)
def test_a_naive_marker_is_caught(database: Database, defect: type[defects.Defective]) -> None:
    with closing(defect(database)) as marker, pytest.raises(Violation):
        Scenarios(database, marker, 1).run(list(Kind) * (DEFECT_SCENARIOS_MAX // len(Kind)))


@pytest.mark.slow
def test_a_marker_that_keeps_the_transaction_is_caught_when_the_duplicate_is_swallowed(database: Database) -> None:
    kinds = [Kind.LATE_COMMIT] * DEFECT_SCENARIOS_MAX
    with closing(defects.KeepsTheTransaction(database)) as marker:
        scenarios = Scenarios(database, marker, 1, swallows=True)
        if database.name == "postgres":
            # The server itself refuses to commit after an error.
            scenarios.run(kinds[:SWALLOWING])
        else:
            with pytest.raises(Violation):
                scenarios.run(kinds)
