"""Producers and consumers of kiteq, written as a user of the client would write them."""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Iterator
from typing import Any, Final

import anyio
import anyio.lowlevel
from anyio.to_thread import run_sync

from benchmark.load.channel import NUMBER, PROGRESS_SECONDS, Job, Seen, Timer, say
from benchmark.load.statistics import percentiles
from kiteq_client import (
    Client,
    Message,
    NotConnected,
    PartlySent,
    Received,
    Refused,
    SendTimeout,
    direct,
)

CHUNK_TASKS: Final = 3
"""Tasks that build and send chunks in turn, so the window never runs dry between two of them."""
RETRY_SECONDS: Final = 0.05
EVEN_PAUSE_SECONDS_MAX: Final = 0.0002


class Tally:
    """What a producer counts."""

    def __init__(self) -> None:
        self.sent = 0
        self.retries = 0
        self.duplicates_answered = 0


def _client(job: Job, **options: Any) -> Client:
    return Client(job.registry, group=job.group, timeout=30, **options)


def _messages(job: Job, numbers: range) -> list[Message]:
    padding, stamp = job.padding(), 0
    return [Message(job.topic, job.message_type, NUMBER.pack(number, stamp) + padding) for number in numbers]


async def _send_surely(client: Client, messages: list[Message], tally: Tally) -> None:
    """Send until each one is accepted; the ids stay the same, so a repeat is stored once."""
    while messages:
        try:
            receipts = await client.send_many(messages)
        except PartlySent as partly:
            results = partly.results
            for error in (result for result in results if isinstance(result, Refused)):
                if not error.temporary:
                    raise error from partly
            tally.sent += sum(not isinstance(result, BaseException) for result in results)
            messages = [
                message for message, result in zip(messages, results, strict=True) if isinstance(result, BaseException)
            ]
        except (SendTimeout, NotConnected):
            pass
        else:
            tally.sent += len(receipts)
            tally.duplicates_answered += sum(receipt.duplicate for receipt in receipts)
            return
        tally.retries += 1
        await anyio.sleep(RETRY_SECONDS)


def _chunks(job: Job) -> Iterator[range]:
    end = job.first + job.count
    for start in range(job.first, end, job.window):
        yield range(start, min(start + job.window, end))


async def go() -> None:
    """Wait for the command to go."""
    await run_sync(sys.stdin.readline, abandon_on_cancel=True)


async def report(tally: Tally) -> None:
    """Tell the benchmark how many were sent, until cancelled."""
    while True:
        await anyio.sleep(PROGRESS_SECONDS)
        say(progress=tally.sent)


async def produce(job: Job) -> None:
    """Keep `window` messages unanswered until `count` are accepted. Building them is part of the time."""
    tally = Tally()
    async with _client(job, topics=[job.topic], max_in_flight=job.window) as client:
        say(ready=True)
        await go()
        timer = Timer()
        chunks = _chunks(job)

        async def send_chunks() -> None:
            for numbers in chunks:
                await _send_surely(client, _messages(job, numbers), tally)

        async with anyio.create_task_group() as outer:
            outer.start_soon(report, tally)
            async with anyio.create_task_group() as senders:
                for _ in range(CHUNK_TASKS):
                    senders.start_soon(send_chunks)
            timed = timer.fields()
            outer.cancel_scope.cancel()
    say(done=True, sent=tally.sent, retries=tally.retries, duplicates_answered=tally.duplicates_answered, **timed)


async def one_by_one(job: Job) -> None:
    """Window 1: the next message is sent when the one before is on disk."""
    latencies = array("d")
    padding = job.padding()
    async with _client(job, topics=[job.topic]) as client:
        say(ready=True)
        await go()
        timer = Timer()
        for number in range(job.first, job.first + job.count):
            message = Message(job.topic, job.message_type, NUMBER.pack(number, 0) + padding)
            began = time.perf_counter()
            await client.send(message)
            latencies.append(time.perf_counter() - began)
        timed = timer.fields()
    say(done=True, sent=job.count, latencies_ms=percentiles(latencies, 1e3), **timed)


async def many_tasks(job: Job) -> None:
    """`tasks` tasks that each await `send`, as the requests of a web service do."""
    tally = Tally()
    padding = job.padding()
    numbers = iter(range(job.first, job.first + job.count))
    async with _client(job, topics=[job.topic]) as client:
        say(ready=True)
        await go()
        timer = Timer()

        async def send_own() -> None:
            for number in numbers:
                await client.send(Message(job.topic, job.message_type, NUMBER.pack(number, 0) + padding))
                tally.sent += 1

        async with anyio.create_task_group() as outer:
            outer.start_soon(report, tally)
            async with anyio.create_task_group() as senders:
                for _ in range(job.tasks):
                    senders.start_soon(send_own)
            timed = timer.fields()
            outer.cancel_scope.cancel()
    say(done=True, sent=tally.sent, **timed)


async def wait_until_due(due: float, even: bool) -> None:
    """Sleep until `due`. The loop's timers tick in milliseconds; `even` fills in with short blocking sleeps."""
    while (remaining := due - time.monotonic()) > 0:
        if not even:
            await anyio.sleep(remaining)
        else:
            time.sleep(min(remaining, EVEN_PAUSE_SECONDS_MAX))  # noqa: ASYNC251 shorter than the loop's own timer
            await anyio.lowlevel.checkpoint()


async def steady(job: Job) -> None:
    """Start one `send` every 1/rate seconds, whatever the answers do."""
    lateness = array("d")
    padding = job.padding()
    tally = Tally()
    async with _client(job, topics=[job.topic], max_in_flight=10_000) as client, anyio.create_task_group() as outer:

        async def send(number: int) -> None:
            body = NUMBER.pack(number, time.monotonic_ns()) + padding
            await client.send(Message(job.topic, job.message_type, body))
            tally.sent += 1

        say(ready=True)
        await go()
        timer = Timer()
        outer.start_soon(report, tally)
        async with anyio.create_task_group() as senders:
            for offset in range(job.count):
                due = timer.began + offset / job.rate
                await wait_until_due(due, job.even)
                lateness.append(time.monotonic() - due)
                senders.start_soon(send, job.first + offset)
                if job.even:
                    await anyio.lowlevel.checkpoint()
        timed = timer.fields()
        outer.cancel_scope.cancel()
    say(done=True, sent=tally.sent, lateness_ms=percentiles(lateness, 1e3), **timed)


async def bind(job: Job) -> None:
    """Make the group's binding and go away: what is published from now on waits for it."""
    async with _client(job, bindings=[direct(job.topic, job.message_type)]):
        say(ready=True)
    say(done=True)


async def consume(job: Job) -> None:
    """Take messages until all numbers came (or, in a shared group, until told to stop)."""
    seen = Seen(job)
    finished = anyio.Event()
    latencies = array("d")
    # A binding to a name and a local are cheaper than an attribute: this runs for each message.
    unpack_from, add, count, alone = NUMBER.unpack_from, seen.add, job.count, job.alone
    monotonic, monotonic_ns = time.monotonic, time.monotonic_ns

    async def handle(message: Received) -> None:
        number, sent_at = unpack_from(message.body)
        if sent_at:
            latencies.append((monotonic_ns() - sent_at) / 1e6)
        if add(number) == count and alone:
            finished.set()
        elif not alone:
            seen.last_at = monotonic()

    async def report() -> None:
        while True:
            await anyio.sleep(PROGRESS_SECONDS)
            say(progress=seen.distinct)

    async def obey() -> None:
        await go()
        finished.set()

    client = _client(job, bindings=[direct(job.topic, job.message_type)], on_message=handle, prefetch=job.prefetch)
    async with anyio.create_task_group() as tasks:
        async with client:
            timer = Timer()
            say(ready=True)
            tasks.start_soon(report)
            tasks.start_soon(obey)
            await finished.wait()
        timed = timer.fields()  # after leaving: the last acks are on disk
        tasks.cancel_scope.cancel()
    say(
        done=True,
        distinct=seen.distinct,
        strangers=seen.strangers,
        seen=seen.save(job),
        latencies_ms=percentiles(latencies),
        **seen.corrected(timed, job),
    )
