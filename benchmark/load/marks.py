"""What a durable round trip costs at least: one commit of LMDB, and one echo over TCP."""

from __future__ import annotations

import functools
import shutil
import socket
import sys
import time
from array import array
from pathlib import Path
from typing import Final

import lmdb
import trio

from benchmark.load.channel import Job, say
from benchmark.load.statistics import percentiles

VALUE_BYTES: Final = 200
MAP_BYTES: Final = 1 << 30


def commit(job: Job) -> None:
    """`count` commits of one put of 200 bytes each, every one fsync'ed, with nothing around them."""
    folder = Path(job.folder) / f"{job.name}.lmdb"
    say(ready=True)
    sys.stdin.readline()
    times = array("d")
    value = b"v" * VALUE_BYTES
    with lmdb.open(str(folder), map_size=MAP_BYTES, sync=True, metasync=True) as environment:
        for number in range(job.count):
            key = number.to_bytes(8, "big")
            began = time.perf_counter()
            with environment.begin(write=True) as transaction:
                transaction.put(key, value, append=True)
            times.append(time.perf_counter() - began)
    shutil.rmtree(folder)
    say(done=True, latencies_ms=percentiles(times, 1e3))


async def _echo(stream: trio.SocketStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


def echo_server(job: Job) -> None:
    """A TCP echo under trio, on the port of the job, until told to stop."""

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(functools.partial(trio.serve_tcp, _echo, job.port, host="127.0.0.1"))
            say(ready=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
            nursery.cancel_scope.cancel()

    trio.run(serve)
    say(done=True)


def echo_client(job: Job) -> None:
    """`count` round trips of 200 bytes."""
    times = array("d")

    async def ask() -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", job.port)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with stream:
            say(ready=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
            for _ in range(job.count):
                began = time.perf_counter()
                await stream.send_all(b"e" * VALUE_BYTES)
                left = VALUE_BYTES
                while left:
                    left -= len(await stream.receive_some(left))
                times.append(time.perf_counter() - began)

    trio.run(ask)
    say(done=True, latencies_ms=percentiles(times, 1e3))
