"""Programs of the examples as processes, with what they print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.broker import BrokerProcess

__all__ = ["ROOT", "Program", "Stage", "until"]

ROOT: Final = Path(__file__).resolve().parent.parent.parent
WAIT_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.05
QUICK_CHECKS: Final = {"KITEQ_CHECK_AFTER": "0.2", "KITEQ_CHECK_ELSEWHERE_AFTER": "0.2"}


def until(condition: Callable[[], bool], explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(POLL_SECONDS)


class Program:
    """A running program; it prints into a file."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self._path = path

    @property
    def output(self) -> str:
        return self._path.read_text()

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.output, lambda: f"no {text!r} in:\n{self.output}")

    def wait_killed(self) -> None:
        status = self.process.wait(WAIT_SECONDS_MAX)
        assert status == -signal.SIGKILL, self.output

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(WAIT_SECONDS_MAX) == 0, self.output


class Stage:
    """A folder, a broker that checks soon, and the programs that were started."""

    def __init__(self, folder: Path, broker: BrokerProcess | None = None) -> None:
        self.folder = folder
        self.broker = broker or BrokerProcess(folder, environment=QUICK_CHECKS)
        self._started: list[Program] = []

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(ROOT), str(ROOT / "client")))
        return os.environ | {"PYTHONPATH": path, "KITEQ_BROKER": self.broker.address, "PYTHONUNBUFFERED": "1"}

    def start(self, *words: str) -> Program:
        path = self.folder / f"program-{len(self._started)}.log"
        with path.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._started.append(Program(process, path))
        return self._started[-1]

    def run(self, *words: str) -> tuple[int, str]:
        """Run a program to its end; return its status and what it printed."""
        program = self.start(*words)
        return program.process.wait(WAIT_SECONDS_MAX), program.output

    @contextmanager
    def open(self) -> Iterator[Stage]:
        with self.broker:
            try:
                yield self
            finally:
                for program in self._started:
                    if program.process.poll() is None:
                        program.process.kill()
                        program.process.wait(WAIT_SECONDS_MAX)
