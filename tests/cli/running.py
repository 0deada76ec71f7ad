"""The command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.broker import DISK_FREE_MIN, BrokerProcess

__all__ = ["environment", "kiteq", "listening", "refused", "run"]


def environment(**more: str) -> dict[str, str]:
    """Return the environment without settings of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KITEQ_")}
    return kept | {"KITEQ_DISK_FREE_MIN": str(DISK_FREE_MIN)} | more


def kiteq(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in `folder`, with `more` in the environment."""
    done = subprocess.run(
        [sys.executable, "-m", "kiteq", *words],
        cwd=folder,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def refused(folder: Path, *words: str, status: int, **more: str) -> str:
    """Run a command that must fail; return its one sentence, without the name of the program."""
    done = kiteq(folder, *words, **more)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("kiteq: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("kiteq: ").rstrip("\n")


def run(broker: BrokerProcess, *words: str) -> str:
    """Run a command that must do its work and say nothing on standard error; return what it prints."""
    done = kiteq(broker.folder, *words, KITEQ_BROKER=broker.address)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@contextmanager
def listening(broker: BrokerProcess, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Start `kiteq listen` and go on when it says that it is bound."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kiteq", "listen", *words],
        cwd=broker.folder,
        env=environment(KITEQ_BROKER=broker.address),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = (process.stderr if "--json" in words else process.stdout).readline()
        assert line.startswith("listening to ")
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)
