"""The processes of load, driven from the benchmark: ready, go, progress, done."""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmark.harness.process import ROOT
from benchmark.harness.servers import BenchmarkError, Target
from benchmark.load.channel import Job

READY_SECONDS_MAX: Final = 30.0
STALL_SECONDS_MAX: Final = 60.0
"""Without any progress for this long something hangs: the run ends and says so."""
SETTLE_SECONDS: Final = 0.5
POLL_SECONDS: Final = 0.1


class Worker:
    """One process of load and the last thing it said."""

    def __init__(self, job: Job, inbox: queue.SimpleQueue[None]) -> None:
        self.job = job
        self.ready = False
        self.progress = 0
        self.result: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []
        self._inbox = inbox
        command = [sys.executable, "-m", "benchmark.load.worker", json.dumps(dataclasses.asdict(job))]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            fields = json.loads(line)
            if fields.get("done"):
                self.result = fields
            if "event" in fields:
                self.events.append(fields)
            self.progress = fields.get("progress", self.progress)
            self.ready = self.ready or fields.get("ready", False)
            self._inbox.put(None)
        self.process.wait()
        self._inbox.put(None)

    def command(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    @property
    def done(self) -> bool:
        return self.result is not None

    @property
    def died(self) -> bool:
        return self.process.poll() is not None and not self._reader.is_alive() and not self.done

    def close(self) -> None:
        if self.process.poll() is None and not self.done:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Crew:
    """All workers of one run against one server; leaving ends what still runs.

    A kiteq broker that dies meanwhile, whoever killed it, is started again on its folder and port:
    the workers reconnect, and the count at the end tells whether anything acked is missing.
    """

    def __init__(self, server: Target | None, folder: Path, loop: str = "trio") -> None:
        self.server = server
        self.folder = folder
        self._loop = loop
        self._inbox: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._workers: list[Worker] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.close()

    def start(self, role: str, *, system: str | None = None, port: int | None = None, **fields: Any) -> Worker:
        """Start one worker and return when it is connected and waits to go."""
        if self.server is not None:
            system, port = system or self.server.system, port or self.server.port
            fields.setdefault("registry", self.server.url)
        assert system is not None
        name = f"{role}-{len(self._workers)}"
        job = Job(system, role, port or 0, folder=str(self.folder), name=name, loop=self._loop, **fields)
        worker = Worker(job, self._inbox)
        self._workers.append(worker)
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not worker.ready:
            self._check(worker)
            if time.monotonic() > deadline:
                raise BenchmarkError(f"the {role} worker was not ready after {READY_SECONDS_MAX:.0f} s")
            self._listen()
        return worker

    def run(self, role: str, **fields: Any) -> dict[str, Any]:
        """Start one worker, let it go, and return its result."""
        worker = self.start(role, **fields)
        worker.command("go")
        self.wait([worker])
        assert worker.result is not None
        return worker.result

    def wait(self, workers: list[Worker], label: str | None = None) -> None:
        """Return when all are done. `label` shows a bar of what they have done so far, for people."""
        total = sum(worker.job.count for worker in workers)
        moved_at = time.monotonic()
        before = -1
        hidden = label is None or not sys.stderr.isatty()
        with tqdm(total=total, desc=label, unit=" msg", unit_scale=True, disable=hidden, leave=False) as bar:
            while not all(worker.done for worker in workers):
                for worker in workers:
                    self._check(worker)
                self._listen()
                self._stop_shared_groups(workers)
                now = sum(worker.progress + worker.done for worker in workers)
                if now != before:
                    before, moved_at = now, time.monotonic()
                    bar.update(min(now, total) - bar.n)
                elif time.monotonic() - moved_at > STALL_SECONDS_MAX:
                    state = ", ".join(f"{w.job.name} {w.progress} of {w.job.count}" for w in workers if not w.done)
                    raise BenchmarkError(f"nothing moved for {STALL_SECONDS_MAX:.0f} s: {state}")

    def wait_until(self, holds: Callable[[], bool], what: str, seconds: float = STALL_SECONDS_MAX) -> None:
        """Return when what the workers said makes `holds` true; they go on."""
        deadline = time.monotonic() + seconds
        while not holds():
            for worker in self._workers:
                self._check(worker)
            if time.monotonic() > deadline:
                raise BenchmarkError(f"after {seconds:.0f} s {what} is still not so")
            self._listen()

    def _stop_shared_groups(self, workers: list[Worker]) -> None:
        """A member of a group with several connections cannot know that the others have the rest."""
        shared = [worker for worker in workers if worker.job.role == "consume" and not worker.job.alone]
        for group in {worker.job.group for worker in shared}:
            members = [worker for worker in shared if worker.job.group == group and not worker.done]
            if members and sum(worker.progress for worker in members) >= members[0].job.count:
                time.sleep(SETTLE_SECONDS)
                for worker in members:
                    worker.command("stop")
                for worker in members:
                    worker.process.wait()

    def _listen(self) -> None:
        try:
            self._inbox.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return

    def _check(self, worker: Worker) -> None:
        if worker.died:
            raise BenchmarkError(f"the worker {worker.job.name} ended with status {worker.process.returncode}")
        server = self.server
        if server is None or server.alive():
            return
        if server.system != "kiteq":
            raise BenchmarkError(f"{server.system} died:\n{server.tail()}")
        tqdm.write("the broker was killed; starting it again on the same folder", file=sys.stderr)
        server.restart()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Numbers sent against numbers received, of all groups together."""

    lost: int
    duplicates: int
    strangers: int


def compare(consumers: list[Worker]) -> Comparison:
    """Add up, per group, how often each number came: 0 is lost, above 1 a duplicate."""
    groups: dict[str, npt.NDArray[np.int64]] = {}
    strangers = 0
    for worker in consumers:
        assert worker.result is not None
        counts = np.frombuffer(Path(worker.result["seen"]).read_bytes(), dtype=np.uint8).astype(np.int64)
        groups[worker.job.group] = groups.get(worker.job.group, np.zeros_like(counts)) + counts
        strangers += worker.result["strangers"]
    lost = sum(int((counts == 0).sum()) for counts in groups.values())
    duplicates = sum(int(np.clip(counts - 1, 0, None).sum()) for counts in groups.values())
    return Comparison(lost, duplicates, strangers)
