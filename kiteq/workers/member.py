"""One worker as the process that runs them sees it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import trio

from kiteq.binding.bindings import Binding, to_wire
from kiteq.config import Settings
from kiteq.registry.merging import Key
from kiteq.workers.backoff import Backoff
from kiteq.workers.channel import NODES_PER_MESSAGE, Channel, Message

__all__ = ["Member", "status_text"]

MODULE: Final = "kiteq.cli.worker"


@dataclass(eq=False, slots=True)
class Member:
    """A place in the set, over all processes that fill it one after the other.

    address, http: HOST:PORT each, known once the worker was ready. failure: the sentence and the status its
    process ended with, when it has told. dirty: nodes it has not been told of as they are now.
    """

    number: int
    settings: Settings
    process: trio.Process | None = None
    channel: Channel | None = None
    address: str | None = None
    http: str | None = None
    failure: tuple[str, int] | None = None
    is_open: bool = False
    dirty: set[Key] = field(default_factory=set)
    backoff: Backoff = field(default_factory=Backoff)

    @asynccontextmanager
    async def running(self, nodes: Mapping[Key, tuple[Binding, ...]]) -> AsyncIterator[trio.Process]:
        """Start a process that takes this place; leaving lets it know that nobody needs it any more.

        In a session of its own: Ctrl-C in the terminal is for the process that runs the workers alone.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours, theirs:
            words = [sys.executable, *_safe_path(), "-m", MODULE, str(self.number), str(theirs.fileno())]
            process = await trio.lowlevel.open_process(
                words, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True
            )
            theirs.close()
            channel = Channel(ours, lambda: self._changes(nodes))
            channel.post("settings", asdict(self.settings))
            self.process, self.channel, self.failure = process, channel, None
            try:
                yield process
            finally:
                channel.close()
                self.channel = None
                self.is_open = False
                self.dirty.clear()

    def open(self, keys: Iterable[Key]) -> None:
        """Tell it of these nodes, and from now on of changes."""
        assert self.channel is not None
        self.is_open = True
        self.dirty.update(keys)
        self.channel.post("opened")

    def note_changed(self, keys: Iterable[Key]) -> None:
        """Have it told of nodes that have changed, if it has asked to be."""
        if self.is_open and self.channel is not None:
            self.dirty.update(keys)
            self.channel.ring()

    def post(self, *message: object) -> None:
        """Tell it something, if it runs."""
        if self.channel is not None:
            self.channel.post(*message)

    def kill(self) -> None:
        """End its process at once, as `kill -9` does."""
        if self.process is not None:
            self.process.kill()

    def _changes(self, nodes: Mapping[Key, tuple[Binding, ...]]) -> Iterable[Message]:
        rows: list[tuple[str, str, list[list[object]] | None]] = []
        for topic, group in self.dirty:
            node = nodes.get((topic, group))
            rows.append((topic, group, None if node is None else [to_wire(one) for one in node]))
        self.dirty.clear()
        return [("nodes", rows[start : start + NODES_PER_MESSAGE]) for start in range(0, len(rows), NODES_PER_MESSAGE)]


def _safe_path() -> list[str]:
    """Return what keeps modules of the current folder out of a worker, unless they are visible here too."""
    return [] if sys.path[0] in {"", str(Path.cwd())} else ["-P"]


def status_text(status: int) -> str:
    """Return how a process has ended: its exit status, or the name of the signal."""
    if status >= 0:
        return str(status)
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
