"""Many messages that wait: the broker's memory does not grow with them, nor does its start take longer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.limits import DUPLICATE_IDS_MAX, MIB
from kiteq.message import Message
from tests.e2e.wire import RawClient
from tests.support.broker import BrokerProcess

BATCH = 500

BESIDE_BYTES_MAX = 40 * MIB
"""What a busy broker may take beside its messages and the ids of the duplicate window."""
ID_BYTES = 200
"""An id of that window, in a dict."""


def rss_anon(pid: int) -> int:
    """Return the anonymous memory of a process in bytes: without the pages of the store's file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def batches(count: int, size: int, due_s: float) -> Iterator[list[Message]]:
    """Return messages that are due within a second, in whole milliseconds, so that many rows are small."""
    for start in range(0, count, BATCH):
        moment = due_s + start / count
        yield [Message("t", "a", bytes(size), deliver_at=moment + at // 100 / 1000) for at in range(BATCH)]


@pytest.mark.usefixtures("folder")  # it removes the store
@pytest.mark.parametrize(
    ("count", "size", "wait_s"),
    [
        pytest.param(50_000, 2_000, 5, marks=pytest.mark.slow, id="50,000"),
        pytest.param(1_000_000, 500, 60, marks=pytest.mark.long, id="1,000,000"),
    ],
)
async def test_waiting_messages_take_disk_and_no_memory(tmp_path: Path, count: int, size: int, wait_s: float) -> None:
    growth_max = BESIDE_BYTES_MAX + min(count, DUPLICATE_IDS_MAX) * ID_BYTES

    async def greeted(process: BrokerProcess) -> RawClient:
        client = RawClient(await trio.open_tcp_stream(process.host, process.port))
        await client.hello("g", [fanout("t")])
        return client

    async with BrokerProcess(tmp_path) as process:
        client = await greeted(process)
        at_start = rss_anon(process.pid)
        due_s = time.time() + wait_s
        for messages in batches(count, size, due_s):
            await client.publish(messages)
        assert rss_anon(process.pid) - at_start < growth_max
        process.kill()
        await client.stream.aclose()
        await trio.to_thread.run_sync(process.start)
        client = await greeted(process)
        highest = 0
        with trio.fail_after(2 * wait_s + 60):
            while (await client.row("g"))["pending"] < count:
                highest = max(highest, rss_anon(process.pid))
                await trio.sleep(0.05)
        assert highest - at_start < growth_max
        assert (await client.row("g"))["pending"] == count
        assert (await client.admin("stat"))["delayed"] == {"messages": 0, "bytes": 0, "next_due_ms": None}
        await client.stream.aclose()
