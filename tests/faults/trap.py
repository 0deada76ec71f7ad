"""A named point of a program at which processes are killed: set by a test, sprung by the program itself.

The test writes `armed.json` into the folder that it shares with the broker and the producer, and the pid of
each beside it. Whoever passes the point first kills the victims, itself last. A trap is sprung once.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["BROKER", "PRODUCER", "Trap", "note_pid", "set_trap", "sprung_at"]

BROKER: Final = "broker"
PRODUCER: Final = "producer"
ARMED: Final = "armed.json"
SPRUNG: Final = "sprung"


def note_pid(folder: Path, name: str, pid: int) -> None:
    """Tell the programs whom to kill."""
    (folder / f"{name}.pid").write_text(str(pid))


def set_trap(folder: Path, point: str, victims: Sequence[str], *, commit: bool | None = None) -> None:
    """Kill processes at a point. commit: only where such a decision passes it; None for any."""
    (folder / SPRUNG).unlink(missing_ok=True)
    new = folder / f"{ARMED}.new"
    new.write_text(json.dumps([point, commit, list(victims)]))
    new.rename(folder / ARMED)


def sprung_at(folder: Path) -> float | None:
    """Return when the trap was sprung, in seconds of the monotonic clock; None if it was not yet."""
    with suppress(FileNotFoundError):
        return float((folder / SPRUNG).read_text())
    return None


class Trap:
    """The side of the program. name: `BROKER` or `PRODUCER`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._lock = threading.Lock()

    def reach(self, point: str, *commits: bool) -> None:
        """Pass a point. commits: the decisions that pass it."""
        with self._lock:
            try:
                wanted, commit, victims = json.loads((self._folder / ARMED).read_text())
            except FileNotFoundError:
                return
            if point != wanted or (commit is not None and commit not in commits):
                return
            new = self._folder / f"{SPRUNG}.new"
            new.write_text(repr(time.monotonic()))
            new.rename(self._folder / SPRUNG)
            (self._folder / ARMED).unlink()
            for victim in sorted(victims, key=lambda victim: victim == self._name):
                pid = os.getpid() if victim == self._name else int((self._folder / f"{victim}.pid").read_text())
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
