"""The same work through Redis Streams: redis-py with hiredis, its commands packed without wrappers."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from array import array
from typing import Any, Final

import redis
from redis.connection import Connection

from benchmark.load.channel import NUMBER, PROGRESS_SECONDS, Job, Seen, Timer, say
from benchmark.load.statistics import percentiles

READ_COUNT: Final = 256
BLOCK_MS: Final = 200


def _connect(job: Job) -> Any:
    make: Any = Connection  # redis-py does not type its constructor
    connection = make(host="127.0.0.1", port=job.port, socket_timeout=60, protocol=2)
    connection.connect()
    return connection


def _call(connection: Any, *words: Any) -> Any:
    connection.send_command(*words)
    return connection.read_response()


def _numbers(job: Job, size: int) -> list[range]:
    end = job.first + job.count
    return [range(start, min(start + size, end)) for start in range(job.first, end, size)]


def produce(job: Job) -> None:
    """Pipelines of `window` XADD, each read to its end before the next.

    With `overlap` two pipelines of half the window are under way at a time, so that Redis always has work.
    """
    connection = _connect(job)
    padding = job.padding()
    size = max(1, job.window // 2) if job.overlap else job.window
    say(ready=True)
    sys.stdin.readline()
    timer = Timer()
    told_at = timer.began
    waiting = sent = 0
    for numbers in _numbers(job, size):
        commands = [("XADD", job.topic, "*", "b", NUMBER.pack(number, 0) + padding) for number in numbers]
        packed = connection.pack_commands(commands)
        connection.send_packed_command(packed)
        for _ in range(waiting if job.overlap else len(numbers)):
            connection.read_response()
            sent += 1
        waiting = len(numbers) if job.overlap else 0
        if time.monotonic() - told_at > PROGRESS_SECONDS:
            told_at = time.monotonic()
            say(progress=sent)
    for _ in range(waiting):
        connection.read_response()
        sent += 1
    say(done=True, sent=sent, retries=0, duplicates_answered=0, **timer.fields())


def one_by_one(job: Job) -> None:
    connection = _connect(job)
    padding = job.padding()
    latencies = array("d")
    say(ready=True)
    sys.stdin.readline()
    timer = Timer()
    for number in range(job.first, job.first + job.count):
        body = NUMBER.pack(number, 0) + padding
        began = time.perf_counter()
        _call(connection, "XADD", job.topic, "*", "b", body)
        latencies.append(time.perf_counter() - began)
    say(done=True, sent=job.count, latencies_ms=percentiles(latencies, 1e3), **timer.fields())


def bind(job: Job) -> None:
    """Make the consumer group; what is added from now on waits for it."""
    _make_group(_connect(job), job)
    say(ready=True)
    say(done=True)


def _make_group(connection: Any, job: Job) -> None:
    with contextlib.suppress(redis.ResponseError):  # it is there already
        _call(connection, "XGROUP", "CREATE", job.topic, job.group, "$", "MKSTREAM")


def consume(job: Job) -> None:
    """XREADGROUP of up to 256 and one XACK for them, until all numbers came."""
    connection = _connect(job)
    _make_group(connection, job)
    seen = Seen(job)
    stopped = threading.Event()

    def obey() -> None:
        sys.stdin.readline()
        stopped.set()

    threading.Thread(target=obey, daemon=True).start()
    timer = Timer()
    told_at = timer.began
    say(ready=True)
    unpack_from, add = NUMBER.unpack_from, seen.add
    read = ("XREADGROUP", "GROUP", job.group, job.name, "COUNT", READ_COUNT, "BLOCK", BLOCK_MS)
    while not (stopped.is_set() or (job.alone and seen.distinct == job.count)):
        reply = _call(connection, *read, "STREAMS", job.topic, ">")
        if reply:
            entries = reply[0][1]
            for _, fields in entries:
                add(unpack_from(fields[1])[0])
            _call(connection, "XACK", job.topic, job.group, *[entry[0] for entry in entries])
            seen.last_at = time.monotonic()
        if time.monotonic() - told_at > PROGRESS_SECONDS:
            told_at = time.monotonic()
            say(progress=seen.distinct)
    fields = timer.fields()
    say(
        done=True,
        distinct=seen.distinct,
        strangers=seen.strangers,
        seen=seen.save(job),
        latencies_ms={},
        **seen.corrected(fields, job),
    )
