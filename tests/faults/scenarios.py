"""Short, exact runs, each of which walks through one promise: what a defect there would break is seen at once."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import trio

from kiteq.binding.bindings import Binding, direct, fanout, regex
from kiteq.message import Message
from kiteq.remoting.packets import NACK_REJECTED
from tests.faults.driver import Arrival, DriverConnection, Lost, open_connection
from tests.faults.history import BrokerStarted, BrokerStopped, Corrupted, Drained, History
from tests.faults.load import final_state, note_waiting
from tests.support.broker import BrokerProcess

__all__ = ["SCENARIOS", "Scenario", "Stage"]

ACK_DEADLINE: Final = 60.0
CHECK_LIMIT: Final = 3
ARRIVE_SECONDS_MAX: Final = 5.0
DRAIN_SECONDS_MAX: Final = 2.5
"""Longer than any wait in these runs; a broker with a defect may never become quiet."""


@dataclass
class Stage:
    """A broker, and what its clients saw of it."""

    broker: BrokerProcess
    history: History
    groups: dict[str, list[Binding]] = field(default_factory=dict)
    check_limit: int = CHECK_LIMIT

    async def start(self) -> None:
        """Start the broker, for the first time or again."""
        await trio.to_thread.run_sync(self.broker.start)
        self.history.write(BrokerStarted(time.monotonic()))

    async def kill(self) -> None:
        """Kill the broker as it is."""
        began = time.monotonic()
        await trio.to_thread.run_sync(self.broker.kill)
        self.history.write(BrokerStopped(time.monotonic(), began, "killed"))

    async def producer(self, topics: Sequence[str] = (), *, group: str = "producer") -> DriverConnection:
        """Connect somebody who publishes."""
        return await open_connection(self.broker.port, group, self.history, topics=topics)

    async def consumer(self, group: str, *bindings: Binding, window: int = 100) -> DriverConnection:
        """Connect a member of a group; without bindings, of one that was bound before."""
        self.groups.setdefault(group, list(bindings))
        connection = await open_connection(self.broker.port, group, self.history, bindings=self.groups[group])
        await connection.credit(window)
        return connection

    async def bind(self, group: str, *bindings: Binding) -> None:
        """Bind a group of which nobody stays."""
        connection = await self.consumer(group, *bindings, window=0)
        await connection.goodbye()

    async def publish(self, *messages: Message) -> None:
        """Publish in one frame, wait for the receipts, and leave."""
        connection = await self.producer()
        await connection.publish(messages)
        await connection.answered()
        await connection.goodbye()

    async def in_flight(self, count: int) -> None:
        """Wait until the groups together hold so many messages."""
        inspector = await open_connection(self.broker.port, "inspector", self.history)
        with trio.fail_after(ARRIVE_SECONDS_MAX):
            while sum(row["in_flight"] for row in await inspector.admin("group.list")) != count:  # noqa: ASYNC110
                await trio.sleep(0.01)
        await inspector.drop()

    async def look(self) -> None:
        """Note what the broker counts as waiting, in the middle of a run."""
        inspector = await open_connection(self.broker.port, "inspector", self.history)
        await note_waiting(inspector, self.history)
        await inspector.drop()

    async def finish(self) -> None:
        """Let one member of each group take what is left, and note what the broker says then."""
        async with trio.open_nursery() as nursery:
            for group in self.groups:
                nursery.start_soon(self._take_all, group)
            inspector = await open_connection(self.broker.port, "inspector", self.history)
            quiet, deadline = 0, trio.current_time() + DRAIN_SECONDS_MAX
            while quiet < 3 and trio.current_time() < deadline:
                rows = await inspector.admin("group.list")
                waiting = sum(row["pending"] + row["in_flight"] + row["retrying"] for row in rows)
                quiet = 0 if waiting else quiet + 1
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        self.history.write(Drained(time.monotonic(), quiet >= 3))
        await final_state(inspector, self.history)
        await inspector.drop()

    async def _take_all(self, group: str) -> None:
        connection = await self.consumer(group)
        try:
            while True:
                arrived = await connection.receive()
                with trio.CancelScope(shield=True):
                    if arrived:
                        await connection.ack([arrival.tag for arrival in arrived])
        finally:
            with trio.CancelScope(shield=True):
                await connection.drop()


async def arrivals(connection: DriverConnection, count: int) -> list[Arrival]:
    """Return the next messages, fewer when no more come in time."""
    found: list[Arrival] = []
    with trio.move_on_after(ARRIVE_SECONDS_MAX), suppress(Lost):
        while len(found) < count:
            found += await connection.receive()
    return found


def _messages(count: int, message_type: str = "paid") -> list[Message]:
    return [Message("orders", message_type, b"body %d" % number) for number in range(count)]


ORDERS: Final = fanout("orders")


async def kill_after_receipt(stage: Stage) -> None:
    """A receipt is the promise that the messages outlive the process."""
    await stage.bind("a", ORDERS)
    await stage.publish(*_messages(3))
    await stage.kill()
    await stage.start()


async def kill_after_acks_of_half_a_record(stage: Stage) -> None:
    """Acked with confirmation is acked for ever, also when the neighbours are still owed."""
    consumer = await stage.consumer("a", ORDERS)
    await stage.publish(*_messages(10))
    arrived = await arrivals(consumer, 10)
    await consumer.ack([arrival.tag for arrival in arrived[:5]])
    await consumer.answered()
    await stage.kill()
    await consumer.drop()
    await stage.start()


async def kill_after_acks_out_of_order(stage: Stage) -> None:
    """What lies before acked messages is still owed."""
    consumer = await stage.consumer("a", ORDERS)
    await stage.publish(*_messages(10))
    arrived = await arrivals(consumer, 10)
    await consumer.ack([arrival.tag for arrival in arrived if arrival.tag not in (1, 2, 6)])
    await consumer.answered()
    await stage.kill()
    await consumer.drop()
    await stage.start()


async def kill_after_rejection(stage: Stage) -> None:
    """A rejected message is settled and a dead letter in one step."""
    consumer = await stage.consumer("a", ORDERS)
    await stage.publish(*_messages(2))
    for arrival in await arrivals(consumer, 2):
        await consumer.nack([arrival.tag], NACK_REJECTED)
        await consumer.answered()
    await stage.kill()
    await consumer.drop()
    await stage.start()


async def two_members(stage: Stage) -> None:
    """Messages held by one member are not given to the other."""
    first = await stage.consumer("a", ORDERS, window=4)
    second = await stage.consumer("a", window=4)
    await stage.publish(*_messages(8))
    held = await arrivals(first, 1), await arrivals(second, 1)
    with trio.move_on_after(0.5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(arrivals, first, 100)
            nursery.start_soon(arrivals, second, 100)
    for connection, arrived in zip((first, second), held, strict=True):
        await connection.ack([arrival.tag for arrival in arrived])
        await connection.answered()
        await connection.goodbye()


async def damage_on_the_disk(stage: Stage) -> None:
    """A message whose stored bytes have changed is kept back; its neighbours are delivered."""
    await stage.bind("a", ORDERS)
    messages = _messages(3)
    messages[1] = Message("orders", "paid", b"this is the body whose bytes are changed on the disk")
    await stage.publish(*messages)
    await stage.kill()
    path = stage.broker.folder / "store" / "data.mdb"
    content = path.read_bytes()
    assert messages[1].body in content
    path.write_bytes(content.replace(messages[1].body, messages[1].body.replace(b"bytes", b"Bytes")))
    stage.history.write(Corrupted(time.monotonic(), messages[1].id.hex()))
    await stage.start()


async def send_again_after_restart(stage: Stage) -> None:
    """A message sent again after a restart is recognised."""
    await stage.bind("a", ORDERS)
    messages = _messages(3)
    await stage.publish(*messages)
    await stage.kill()
    await stage.start()
    await stage.publish(*messages)


async def kill_while_a_retry_waits(stage: Stage) -> None:
    """A message that waits for another attempt waits through a restart."""
    consumer = await stage.consumer("a", ORDERS)
    await stage.publish(*_messages(2))
    for arrival in await arrivals(consumer, 2):
        await consumer.nack([arrival.tag], after_ms=400)
    await consumer.answered()
    await stage.kill()
    await consumer.drop()
    await stage.start()


async def kill_after_several_failures(stage: Stage) -> None:
    """From the third failure on the count of attempts is durable."""
    consumer = await stage.consumer("a", ORDERS)
    await stage.publish(*_messages(1))
    for _ in range(3):
        for arrival in await arrivals(consumer, 1):
            await consumer.nack([arrival.tag], after_ms=200)
            await consumer.answered()
    await stage.kill()
    await consumer.drop()
    await stage.start()


async def bound_to_neighbours(stage: Stage) -> None:
    """A group gets the types it asked for, and a regex matches whole types."""
    await stage.bind("a", regex("orders", "pa[a-z]"))
    await stage.bind("b", direct("orders", "paid"))
    await stage.publish(*_messages(2), *_messages(2, "pay"), *_messages(1, "unpay"))


async def kill_after_binding(stage: Stage) -> None:
    """A binding that was confirmed outlives the process, and messages wait for its group."""
    await stage.bind("a", direct("orders", "paid"))
    await stage.kill()
    await stage.start()
    await stage.publish(*_messages(2))


async def leave_out_of_order(stage: Stage) -> None:
    """What members give back when they leave is delivered once more, whatever came back before."""
    first = await stage.consumer("a", ORDERS, window=10)
    await stage.publish(*_messages(10))
    await arrivals(first, 10)
    second = await stage.consumer("a", window=10)
    await stage.publish(*_messages(10))
    arrived = await arrivals(second, 10)
    await first.credit(0)
    await second.credit(0)
    await first.goodbye()
    await stage.in_flight(10)
    await second.nack([arrived[4].tag])
    await second.answered()
    await second.drop()
    third = await stage.consumer("a", window=100)
    arrived = await arrivals(third, 20)
    with trio.move_on_after(0.2), suppress(Lost):
        while True:
            arrived += await third.receive()
    await third.ack([arrival.tag for arrival in arrived])
    await third.answered()
    await third.goodbye()


async def leave_while_the_log_is_read(stage: Stage) -> None:
    """A backlog larger than memory takes arrives whole, also when its only reader comes and goes."""
    await stage.bind("a", ORDERS)
    for _ in range(20):
        await stage.publish(*[Message("orders", "paid", b"x" * 16_000) for _ in range(30)])
    for cycle in range(40):
        # Read on at once: what the window leaves of the first read is little. Then leave at any moment of it.
        consumer = await stage.consumer("a", window=48)
        await trio.sleep(0.0002 * cycle)
        await consumer.goodbye()
        taker = await stage.consumer("a", window=1)
        (first, *_) = await arrivals(taker, 1)
        await taker.ack([first.tag])  # settles with it whatever is taken for a gap before it
        await taker.answered()
        await taker.goodbye()


Scenario = Callable[[Stage], Awaitable[None]]

SCENARIOS: Final[tuple[Scenario, ...]] = (
    kill_after_receipt,
    kill_after_acks_of_half_a_record,
    kill_after_acks_out_of_order,
    kill_after_rejection,
    two_members,
    damage_on_the_disk,
    send_again_after_restart,
    kill_while_a_retry_waits,
    kill_after_several_failures,
    bound_to_neighbours,
    kill_after_binding,
    leave_out_of_order,
    leave_while_the_log_is_read,
)
