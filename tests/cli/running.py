"""The command line as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["environment", "kiteq", "refused"]


def environment(**more: str) -> dict[str, str]:
    """Return the environment without settings of whoever runs the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KITEQ_")} | more


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
