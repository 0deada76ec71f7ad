"""The turns of the thread that talks to the registry, against a session that a test holds in its hands."""

from __future__ import annotations

from typing import cast

from kiteq.registry.errors import RegistryUnavailable
from kiteq.registry.keeper import OVER_MARGIN_SECONDS, RETRY_SECONDS, Keeper, Report
from kiteq.registry.session import Connection, ZooKeeperSession
from tests.registry.parts import ListLog


class StillSession:
    """Is connected, and does nothing. until_over: what `seconds_until_over` says."""

    address = "zk://here"
    connections = 1
    until_over: float | None = None

    def ensure(self) -> None: ...

    def prove(self) -> None: ...

    def catch_up(self) -> None: ...

    def seconds_until_over(self) -> float | None:
        return self.until_over

    def connection(self) -> Connection:
        return Connection(True, 0.0, False, "")


class Told:
    """A part. changes: what each turn returns; the last one is said again and again. fails: whether it raises."""

    unfinished = False
    problem = None

    def __init__(self, *changes: bool) -> None:
        self.changes = list(changes)
        self.fails = False
        self.full: list[bool] = []

    def refresh(self, *, full: bool) -> bool:
        self.full.append(full)
        if self.fails:
            raise RegistryUnavailable("gone")
        return self.changes.pop(0) if len(self.changes) > 1 else self.changes[0]


def kept(session: StillSession, *parts: Told) -> tuple[Keeper[str], list[Report[str]]]:
    reports: list[Report[str]] = []
    keeper = Keeper(cast("ZooKeeperSession", session), parts, lambda: "view", ListLog(), reports.append)
    return keeper, reports


def test_what_has_changed_in_a_turn_that_failed_later_is_told_by_the_next_one() -> None:
    first, second = Told(True, False), Told(False)
    keeper, reports = kept(StillSession(), first, second)
    second.fails = True
    keeper._turn()
    second.fails = False
    for _ in range(2):
        keeper._turn()
    assert [(report.view, report.problem is None) for report in reports] == [
        (None, False), ("view", True), (None, True),
    ]  # fmt: skip
    assert first.full == [True, True, False]


def test_the_bell_rings_at_the_end_of_the_session_if_that_comes_first() -> None:
    session, part = StillSession(), Told(False)
    part.fails = True
    keeper, _ = kept(session, part)
    assert keeper._turn() == RETRY_SECONDS
    session.until_over = 0.25
    assert keeper._turn() == 0.25 + OVER_MARGIN_SECONDS


def test_everything_is_read_again_as_often_as_was_said() -> None:
    part = Told(False)
    reports: list[Report[str]] = []
    keeper = Keeper(
        cast("ZooKeeperSession", StillSession()), (part,), lambda: "view", ListLog(), reports.append, full_seconds=1e6
    )
    left = keeper._turn()
    keeper._turn()
    assert 1e6 - 60 < left <= 1e6
    assert part.full == [True, False]


def test_a_defect_does_not_end_the_thread() -> None:
    keeper, reports = kept(StillSession(), Told())
    assert keeper._turn() == RETRY_SECONDS
    assert "a defect in the registry: IndexError" in str(reports[0].problem)
    assert keeper.state().degraded
