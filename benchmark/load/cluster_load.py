"""Clients while brokers come and go, written as a user of the client would write them."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from pathlib import Path
from typing import Final

import anyio

from benchmark.load.channel import NUMBER, PROGRESS_SECONDS, Job, say
from benchmark.load.kiteq_load import go, wait_until_due
from benchmark.load.statistics import percentiles
from kiteq.errors import KiteQError
from kiteq_client import Client, Message, Received, direct

MEET_PAUSE_SECONDS: Final = 0.01
"""Between two sends of a task that meets brokers: enough of them to use every broker, little enough to disturb none."""
SUBSCRIBE_SECONDS_MAX: Final = 30.0
NOT_ANSWERED: Final = 255


async def meet(job: Job) -> None:
    """Send and consume until told to stop; tell when each broker has acked a first message, and delivered one."""
    broker_of: dict[int, str] = {}
    received_at: dict[int, float] = {}
    met: set[tuple[str, str]] = set()
    errors: Counter[str] = Counter()
    numbers = iter(range(1 << 62))
    padding = job.padding()

    def note(event: str, broker: str, at: float) -> None:
        if (event, broker) not in met:
            met.add((event, broker))
            say(event=event, broker=broker, at=at)

    def note_delivered(number: int) -> None:
        """The receipt tells the broker; it may come before the delivery or after it."""
        if number in broker_of and number in received_at:
            note("delivered", broker_of.pop(number), received_at.pop(number))

    async def handle(message: Received) -> None:
        number, _ = NUMBER.unpack_from(message.body)
        received_at[number] = time.monotonic()
        note_delivered(number)

    async def send() -> None:
        for number in numbers:
            try:
                receipt = await producer.send(Message(job.topic, job.message_type, NUMBER.pack(number, 0) + padding))
            except KiteQError as error:
                errors[type(error).__name__] += 1
                continue
            note("acked", receipt.broker, time.monotonic())
            broker_of[number] = receipt.broker
            note_delivered(number)
            await anyio.sleep(MEET_PAUSE_SECONDS)

    bindings = [direct(job.topic, job.message_type)]
    async with (
        Client(job.registry, group="consumers", bindings=bindings, on_message=handle),
        Client(job.registry, group=job.group, topics=[job.topic]) as producer,
        anyio.create_task_group() as senders,
    ):
        for _ in range(job.tasks):
            senders.start_soon(send)
        say(ready=True)
        await go()
        senders.cancel_scope.cancel()
    say(done=True, errors=errors.total())


async def subscribe(job: Job) -> None:
    """Bind `count` new groups at the one broker, while messages for each are sent to the other, one after the other."""
    confirmed, in_force = array("d"), array("d")
    say(ready=True)
    await go()
    async with Client(job.registry, group=job.group, topics=[job.topic]) as producer:
        for number in range(job.count):
            message_type = f"{job.message_type}-{number}"
            counted = anyio.Event()

            async def send(message_type: str, counted: anyio.Event) -> None:
                while not (await producer.send(Message(job.topic, message_type, b"x"))).groups:
                    pass
                counted.set()

            async with Client(job.other, group=f"group-{number}") as client, anyio.create_task_group() as tasks:
                tasks.start_soon(send, message_type, counted)
                began = time.monotonic()
                await client.subscribe(direct(job.topic, message_type))
                confirmed.append(time.monotonic() - began)
                with anyio.fail_after(SUBSCRIBE_SECONDS_MAX):
                    await counted.wait()
                in_force.append(time.monotonic() - began)
    say(done=True, confirmed_ms=percentiles(confirmed, 1e3), in_force_ms=percentiles(in_force, 1e3))


class _Calls:
    """Each call of `send`: when it began and ended, and the number of the broker that answered it."""

    def __init__(self) -> None:
        self.began = array("d")
        self.ended = array("d")
        self.answered_by = bytearray()
        self.brokers: list[str] = []
        self.errors: Counter[str] = Counter()
        self.answered = 0

    async def send(self, client: Client, job: Job, padding: bytes) -> None:
        number = len(self.began)
        self.ended.append(0.0)
        self.answered_by.append(NOT_ANSWERED)
        self.began.append(time.monotonic())
        try:
            receipt = await client.send(Message(job.topic, job.message_type, NUMBER.pack(number, 0) + padding))
        except KiteQError as error:
            self.errors[type(error).__name__] += 1
        else:
            if receipt.broker not in self.brokers:
                self.brokers.append(receipt.broker)
            self.answered_by[number] = self.brokers.index(receipt.broker)
            self.answered += 1
        self.ended[number] = time.monotonic()

    def save(self, job: Job) -> str:
        path = Path(job.folder) / f"{job.name}.calls"
        path.write_bytes(self.began.tobytes() + self.ended.tobytes() + self.answered_by)
        return str(path)


async def call(job: Job) -> None:
    """Call `send` until told to stop, with the client's own time-out: in `tasks` tasks, or with `rate` on schedule."""
    calls = _Calls()
    padding = job.padding()
    stopped = anyio.Event()

    async def report() -> None:
        while True:
            await anyio.sleep(PROGRESS_SECONDS)
            say(progress=calls.answered)

    async def obey() -> None:
        await go()
        stopped.set()

    async def send_one_by_one() -> None:
        while not stopped.is_set():
            await calls.send(client, job, padding)

    async with Client(job.registry, group=job.group, topics=[job.topic]) as client:
        say(ready=True)
        await go()
        began = time.monotonic()
        async with anyio.create_task_group() as outer:
            outer.start_soon(report)
            outer.start_soon(obey)
            async with anyio.create_task_group() as senders:
                if not job.rate:
                    for _ in range(job.tasks):
                        senders.start_soon(send_one_by_one)
                started = 0
                while job.rate and not stopped.is_set():
                    await wait_until_due(began + started / job.rate, even=False)
                    senders.start_soon(calls.send, client, job, padding)
                    started += 1
            outer.cancel_scope.cancel()
    say(done=True, calls=calls.save(job), brokers=calls.brokers, errors=calls.errors)
