"""The worker's side of the line to the benchmark: JSON lines out, one-word commands in."""

from __future__ import annotations

import json
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

NUMBER: Final = struct.Struct(">QQ")
"""Each body begins with the number of the message and the time it was sent (monotonic ns, 0: not timed)."""
PROGRESS_SECONDS: Final = 0.2
SEEN_MAX: Final = 255


@dataclass(frozen=True)
class Job:
    """What one worker does; travels to it as JSON.

    registry: where a client finds its brokers. other: a second such place, for a second client.
    """

    system: str
    role: str
    port: int
    registry: str = ""
    other: str = ""
    topic: str = "benchmark"
    message_type: str = "sample"
    group: str = "producers"
    first: int = 0
    count: int = 0
    body_bytes: int = 128
    window: int = 1000
    prefetch: int = 1000
    tasks: int = 256
    rate: int = 5000
    even: bool = True
    alone: bool = True
    loop: str = "trio"
    overlap: bool = False
    folder: str = ""
    name: str = ""

    def padding(self) -> bytes:
        return b"x" * max(0, self.body_bytes - NUMBER.size)


def say(**fields: Any) -> None:
    """Tell the benchmark something."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


class Timer:
    """Wall clock and CPU time of this process, from the command to go."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._cpu = time.process_time()

    def fields(self) -> dict[str, float]:
        return {"began": self.began, "ended": time.monotonic(), "cpu": time.process_time() - self._cpu}


class Seen:
    """How often each message number came: one byte a message, so that a million ids are compared cheaply."""

    def __init__(self, job: Job) -> None:
        self.counts = bytearray(job.count)
        self.distinct = 0
        self.strangers = 0
        self.last_at = 0.0
        self._first = job.first

    def add(self, number: int) -> int:
        """Count one; return how many distinct ones came so far."""
        index = number - self._first
        if not 0 <= index < len(self.counts):
            self.strangers += 1
            return self.distinct
        times = self.counts[index]
        if not times:
            self.distinct += 1
            self.counts[index] = 1
        elif times < SEEN_MAX:
            self.counts[index] = times + 1
        return self.distinct

    def corrected(self, timed: dict[str, float], job: Job) -> dict[str, float]:
        """Return the times of a consumer; one that had to be told to stop ended with its last message."""
        return timed if job.alone else {**timed, "ended": self.last_at or timed["began"]}

    def save(self, job: Job) -> str:
        path = Path(job.folder) / f"{job.name}.seen"
        path.write_bytes(self.counts)
        return str(path)
