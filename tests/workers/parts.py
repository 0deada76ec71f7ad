"""Sets of workers for the tests: real processes on neighbouring ports."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import psutil
import trio

from kiteq.binding.bindings import Binding, to_wire
from kiteq.remoting import packets
from tests.e2e.wire import RawClient
from tests.support.broker import BrokerProcess, greet

__all__ = ["PATIENCE_SECONDS", "WorkerSet", "all_gone", "connect", "free_ports", "open_raw", "running", "until"]

PATIENCE_SECONDS: Final = 30.0
"""For what must come; generous, because test processes share few cores."""
POLL_SECONDS: Final = 0.02
_streams: list[trio.SocketStream] = []


def free_ports(count: int) -> int:
    """Return the first of so many neighbouring ports that nothing listens on now.

    Below the ports from which the system chooses by itself.
    """
    while True:
        first = random.randrange(20_000, 32_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(POLL_SECONDS)


class WorkerSet(BrokerProcess):
    """`kiteq --workers N`; `start` returns when every worker greets clients."""

    def __init__(self, folder: Path, count: int, *arguments: str, database: str | None = None) -> None:
        super().__init__(folder, "--workers", str(count), *arguments, database=database)
        self.count = count
        self.port = free_ports(count)

    def address_of(self, number: int) -> str:
        return f"{self.host}:{self.port + number}"

    @property
    def addresses(self) -> list[str]:
        return [self.address_of(number) for number in range(self.count)]

    def start(self) -> None:
        before = self.log().count("Stop it with Ctrl-C.")
        super().start()
        until(lambda: self.log().count("Stop it with Ctrl-C.") > before, f"an introduction in\n{self.log()}")

    def worker(self, number: int) -> psutil.Process | None:
        """Return the process that is worker `number` now."""
        for child in psutil.Process(self.pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.cmdline()[-3:-1] == ["kiteq.cli.worker", str(number)]:
                    return child
        return None

    def pids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [child.pid for child in psutil.Process(self.pid).children()]

    def kill_worker(self, number: int) -> None:
        """End a worker as `kill -9` does; return when its port is closed."""
        process = self.worker(number)
        assert process is not None, self.log()
        process.kill()
        until(lambda: all_gone([process.pid]), "the end of a worker")

    def wait_back(self, number: int) -> None:
        """Wait until a worker greets clients."""

        def greets() -> bool:
            try:
                greet(self.host, self.port + number)
            except OSError:
                return False
            return True

        until(greets, f"worker {number} to be back; log:\n{self.log()}")


def all_gone(pids: list[int]) -> bool:
    """Return whether none of these processes runs any more."""
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


@asynccontextmanager
async def running(workers: WorkerSet) -> AsyncIterator[WorkerSet]:
    """Run a set; leaving ends it, and waits until no worker is left."""
    pids: list[int] = []
    opened = len(_streams)
    try:
        async with workers:
            pids = workers.pids()
            yield workers
            for stream in _streams[opened:]:
                stream.socket.close()
            if workers.is_running:
                pids += workers.pids()
                await trio.to_thread.run_sync(workers.stop)
    finally:
        for stream in _streams[opened:]:
            stream.socket.close()
        del _streams[opened:]
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(until, lambda: all_gone(pids), "the end of the workers")


async def open_raw(address: str) -> RawClient:
    """Return a connection that has said nothing yet; it is closed with the set."""
    host, _, port = address.rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    _streams.append(stream)
    return RawClient(stream)


async def connect(
    address: str, group: str, *bindings: Binding, window: int = 0, versions: tuple[int, ...] = (2,)
) -> RawClient:
    """Return a greeted client of one worker."""
    client = await open_raw(address)
    wire = [to_wire(binding) for binding in bindings]
    await client.ask(
        packets.Hello, packets.Welcome, packets.PROTOCOL, list(versions), os.urandom(16), group, ["trade"], wire, 0, 1
    )
    if window:
        await client.credit(window)
    return client
