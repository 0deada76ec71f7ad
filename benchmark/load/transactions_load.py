"""Producers of transactions, written as a user of the client would write them."""

from __future__ import annotations

import time
from array import array

import anyio

from benchmark.load.channel import NUMBER, Job, Timer, say
from benchmark.load.kiteq_load import Tally, go, report, wait_until_due
from benchmark.load.statistics import percentiles
from kiteq_client import Client, Message, Received, direct


async def many_tasks(job: Job) -> None:
    """`tasks` tasks that each run one transaction after the other; the local one is empty."""
    tally = Tally()
    padding = job.padding()
    numbers = iter(range(job.first, job.first + job.count))
    async with Client(job.registry, group=job.group, timeout=30, topics=[job.topic]) as client:
        say(ready=True)
        await go()
        timer = Timer()

        async def transact() -> None:
            for number in numbers:
                async with client.transaction(
                    Message(job.topic, job.message_type, NUMBER.pack(number, 0) + padding), confirm=True
                ):
                    pass
                tally.sent += 1

        async with anyio.create_task_group() as outer:
            outer.start_soon(report, tally)
            async with anyio.create_task_group() as senders:
                for _ in range(job.tasks):
                    senders.start_soon(transact)
            timed = timer.fields()
            outer.cancel_scope.cancel()
    say(done=True, sent=tally.sent, **timed)


async def steady(job: Job) -> None:
    """A transaction every 1/rate seconds; from its commit to its delivery, to a consumer in this process."""
    latencies, lateness = array("d"), array("d")
    padding = job.padding()
    committed_at: dict[int, int] = {}
    tally = Tally()
    finished = anyio.Event()

    async def handle(message: Received) -> None:
        number, _ = NUMBER.unpack_from(message.body)
        latencies.append((time.monotonic_ns() - committed_at.pop(number)) / 1e6)
        if len(latencies) == job.count:
            finished.set()

    bindings = [direct(job.topic, job.message_type)]
    async with (
        Client(job.registry, group="consumers", timeout=30, bindings=bindings, on_message=handle),
        Client(job.registry, group=job.group, timeout=30, topics=[job.topic]) as client,
        anyio.create_task_group() as outer,
    ):

        async def transact(number: int) -> None:
            async with client.transaction(Message(job.topic, job.message_type, NUMBER.pack(number, 0) + padding)):
                committed_at[number] = time.monotonic_ns()
            tally.sent += 1

        say(ready=True)
        await go()
        timer = Timer()
        outer.start_soon(report, tally)
        async with anyio.create_task_group() as producers:
            for offset in range(job.count):
                due = timer.began + offset / job.rate
                await wait_until_due(due, even=False)
                lateness.append(time.monotonic() - due)
                producers.start_soon(transact, job.first + offset)
        await finished.wait()
        timed = timer.fields()
        outer.cancel_scope.cancel()
    say(
        done=True,
        sent=tally.sent,
        latencies_ms=percentiles(latencies),
        lateness_ms=percentiles(lateness, 1e3),
        **timed,
    )
