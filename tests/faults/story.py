"""Histories told by hand, a step at a time."""

from __future__ import annotations

from tests.faults.history import (
    Bound,
    BrokerStopped,
    Delivered,
    Drained,
    Ended,
    Event,
    FinalDead,
    FinalGroup,
    Opened,
    PublishInvoked,
    PublishOk,
    PublishRefused,
    PublishUnknown,
    Run,
    SettleOk,
    Settling,
)

__all__ = ["DEADLINE", "Story", "consumed"]

DEADLINE = 10.0


class Story:
    """A history told by hand: every step takes a tenth of a second."""

    def __init__(self, *groups: str) -> None:
        self.now = 100.0
        self.events: list[Event] = [Run(self.now, DEADLINE)]
        self.calls = 0
        for group in groups or ("a",):
            self.events.append(Bound(self.step(), group, [["t", 0, "x", True]], True))

    def step(self, seconds: float = 0.1) -> float:
        self.now += seconds
        return self.now

    def publish(
        self,
        message: str = "m1",
        outcome: str = "ok",
        *,
        groups: int | None = None,
        digest: str = "d",
        message_type: str = "x",
        limit: int = 100,
    ) -> None:
        self.calls += 1
        call = str(self.calls)
        self.events.append(PublishInvoked(self.step(), call, "p", message, "t", message_type, digest, limit))
        if outcome == "refused":
            self.events.append(PublishRefused(self.step(), call, "no"))
        elif outcome == "unknown":
            self.events.append(PublishUnknown(self.step(), call))
        else:
            self.events.append(PublishOk(self.step(), call, groups, outcome == "duplicate", True))

    def open(self, connection: str = "a1", group: str = "a") -> None:
        self.events.append(Opened(self.step(), connection, group))

    def end(self, connection: str = "a1", how: str = "dropped") -> None:
        self.events.append(Ended(self.step(), connection, how))

    def deliver(
        self,
        message: str = "m1",
        *,
        on: str = "a1",
        tag: int = 1,
        attempt: int = 1,
        digest: str = "d",
        group: str = "a",
    ) -> None:
        self.events.append(Delivered(self.step(), on, group, tag, message, attempt, digest))

    def settle(
        self, how: str = "ack", *, on: str = "a1", tag: int = 1, confirmed: bool = True, stale: bool = False
    ) -> None:
        self.events.append(Settling(self.step(), on, tag, how))
        if confirmed:
            self.events.append(SettleOk(self.step(), on, tag, stale))

    def kill(self) -> None:
        self.events.append(BrokerStopped(self.step(), self.now, "killed"))

    def finish(self, *, pending: int = 0, dead: int = 0, group: str = "a") -> None:
        self.events.append(Drained(self.step(), pending == 0))
        self.events.append(FinalGroup(self.step(), group, "t", pending, 0, 0, dead))

    def dead(self, message: str = "m1", *, reason: str = "limit", attempts: int = 100, topic: str = "t") -> None:
        self.events.append(FinalDead(self.step(), "a", topic, message, "x", reason, attempts))


def consumed() -> Story:
    story = Story()
    story.publish()
    story.open()
    story.deliver()
    return story
