"""The broker is killed under programs that use `kiteq_client`: sends that returned arrive at every group.

The client hides connections and the answers to acks, so an ack counts here as one of unknown outcome.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random, SystemRandom
from typing import Final

import pytest
import trio

from kiteq.binding.bindings import Binding, direct, fanout
from kiteq.message import Message, Received
from kiteq_client import Client
from tests.faults.checker import check
from tests.faults.driver import open_connection
from tests.faults.history import (
    Bound,
    BrokerStarted,
    BrokerStopped,
    Delivered,
    Drained,
    History,
    Opened,
    Run,
    Settling,
    read_histories,
)
from tests.faults.load import final_state
from tests.faults.sending import digest, send_noted
from tests.support.broker import BrokerProcess

pytestmark = pytest.mark.slow

ROUNDS: Final = 4
BATCH: Final = 50
RUN_SECONDS_MAX: Final = 90.0
BINDINGS: Final[dict[str, list[Binding]]] = {
    "books": [fanout("orders")],
    "mail": [direct("orders", "paid"), direct("orders", "sent")],
}


@dataclass
class Story:
    """What the tasks of the run share."""

    address: str
    history: History
    random: Random
    life: int = 0
    done: bool = False
    drained: bool = False
    calls: Iterator[str] = field(default_factory=lambda: map(str, count()))
    consumers: list[Client] = field(default_factory=list)

    async def produce(self, group: str) -> None:
        """Send batches; what was not accepted is sent again until it is."""
        async with Client(f"kiteq://{self.address}", group=group, timeout=2, wait=False) as client:
            while not self.done:
                left = [
                    Message("orders", self.random.choice(("paid", "sent", "back")), self.random.randbytes(100))
                    for _ in range(BATCH)
                ]
                while left:
                    failed = await send_noted(client, group, left, self.calls, self.history.write)
                    left = [message for message, _ in failed]
                await trio.sleep(self.random.random() * 0.02)

    async def consume(self, group: str) -> None:
        """Handle messages; now and then a handler fails."""
        bindings, tags, opened = BINDINGS[group], count(1), Counter[str]()

        async def handle(message: Received) -> None:
            connection, tag = f"{group}-{self.life}", next(tags)
            if not opened[connection]:
                opened[connection] += 1
                self.history.write(Opened(time.monotonic(), connection, group))
            what = (tag, message.id.hex(), message.attempt, digest(message))
            self.history.write(Delivered(time.monotonic(), connection, group, *what))
            if self.random.random() < 0.1:
                await trio.sleep(self.random.random() * 0.01)
            fails = not self.done and self.random.random() < 0.03
            self.history.write(Settling(time.monotonic(), connection, tag, "failed" if fails else "ack"))
            if fails:
                raise ValueError("the test says so")

        async with Client(f"kiteq://{self.address}", group=group, bindings=bindings, on_message=handle) as client:
            self.consumers.append(client)
            noted = [[one.topic, int(one.kind), one.pattern, one.persistent] for one in bindings]
            self.history.write(Bound(time.monotonic(), group, noted, True))
            await _until(lambda: self.drained)

    async def kill(self, broker: BrokerProcess) -> None:
        """Kill the broker and start it again."""
        began = time.monotonic()
        await trio.to_thread.run_sync(broker.kill)
        self.history.write(BrokerStopped(time.monotonic(), began, "killed"))
        # What a client has read before it notices is still a delivery of the broker that was killed.
        await _until(lambda: not any(client.statistics().connected for client in self.consumers))
        self.life += 1
        await trio.to_thread.run_sync(broker.start)
        self.history.write(BrokerStarted(time.monotonic()))

    async def finish(self, broker: BrokerProcess) -> None:
        """Wait until nothing is left, and note what the broker says."""
        inspector = await open_connection(broker.port, "inspector", self.history)
        quiet = 0
        while quiet < 3:
            rows = await inspector.admin("group.list")
            quiet = 0 if any(row["pending"] + row["in_flight"] + row["retrying"] for row in rows) else quiet + 1
            await trio.sleep(0.1)
        self.history.write(Drained(time.monotonic(), True))
        await final_state(inspector, self.history)
        await inspector.goodbye()


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 a flag of the test, looked at a few times
        await trio.sleep(0.05)


async def test_nothing_a_client_was_told_is_broken_by_kills(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seed = SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201 pytest shows it when the test fails
    caplog.set_level("CRITICAL", "kiteq_client")  # handlers fail on purpose, and the broker is away
    (tmp_path / "broker").mkdir()
    path = tmp_path / "history.jsonl"
    with History(path) as history, trio.fail_after(RUN_SECONDS_MAX):
        history.write(Run(time.monotonic(), 60.0, resends=True))
        async with BrokerProcess(tmp_path / "broker") as broker:
            story = Story(broker.address, history, Random(seed))
            async with trio.open_nursery() as nursery:
                for group in BINDINGS:
                    nursery.start_soon(story.consume, group)
                await trio.sleep(0.2)
                async with trio.open_nursery() as producing:
                    producing.start_soon(story.produce, "shop")
                    producing.start_soon(story.produce, "billing")
                    for _ in range(ROUNDS):
                        await trio.sleep(0.2 + story.random.random() * 0.5)
                        await story.kill(broker)
                    story.done = True
                await story.finish(broker)
                story.drained = True
    events = read_histories([path])
    counted = Counter(type(event).__name__ for event in events)
    print(dict(counted))  # noqa: T201 pytest shows it when the test fails
    assert [str(violation) for violation in check(events)] == []
    assert counted["PublishOk"] > ROUNDS * BATCH
