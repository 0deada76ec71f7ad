"""A pattern made to be slow disturbs nobody: it runs once for each message type, in linear time."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from statistics import median, quantiles

import pytest

from kiteq.binding.bindings import direct, regex
from kiteq.message import Message
from tests.e2e.wire import connect, numbered, running

ROUNDS = 7
SENDS = 150
HOSTILE_PER_SEND = 5


async def p99_ms(folder: Path | str, *, hostile: bool) -> float:
    """Return the 99th percentile of send-to-delivery of one group while others publish long message types."""
    types = count()
    async with running(folder) as broker:
        producer = await connect(broker, "p")
        noise = await connect(broker, "noise")
        bindings = [regex("noise", "(a+)+$"), regex("noise", "(a|aa)+$")] if hostile else [direct("noise", "x")]
        await connect(broker, "hostile", *bindings)
        consumer = await connect(broker, "g", direct("t", "a"), window=100)
        waits = []
        for _ in range(SENDS):
            frame = [Message("noise", f"{'a' * 190}{next(types):09d}b", b"") for _ in range(HOSTILE_PER_SEND)]
            await noise.publish(frame)
            start = time.perf_counter()
            await producer.publish(numbered(1))
            await consumer.ack(await consumer.take(1))
            waits.append((time.perf_counter() - start) * 1000)
        return quantiles(waits, n=100)[98]


@pytest.mark.slow
async def test_a_hostile_pattern_does_not_slow_another_group() -> None:
    plain: list[float] = []
    hostile: list[float] = []
    for _ in range(ROUNDS):  # alternating, so that what else the machine does hits both
        plain.append(await p99_ms("memory://", hostile=False))
        hostile.append(await p99_ms("memory://", hostile=True))
    ratio = median(hostile) / median(plain)
    assert ratio < 1.5, f"p99 {median(hostile):.2f} ms with the pattern, {median(plain):.2f} ms without: {ratio:.2f}"
