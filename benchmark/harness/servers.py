"""The brokers under test, each a process of its own on a free port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from benchmark.harness.process import ROOT, cpu_seconds, free_port, rss_anon_mib
from kiteq.errors import KiteQError
from kiteq.limits import HELLO_FRAME_BYTES_MAX
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import PROTOCOL, WIRE_VERSION, Hello, Welcome

START_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.005


class BenchmarkError(Exception):
    """The benchmark cannot go on; the text says why."""


class Target(Protocol):
    """What load is put on: one broker, or several; entering starts it, leaving ends it."""

    system: str
    port: int
    restarts: int

    @property
    def url(self) -> str:
        """Where clients find it."""

    def alive(self) -> bool:
        """Whether nothing of it has died."""

    def restart(self) -> float:
        """Start again what has died; return the seconds until it served."""

    def cpu_seconds(self) -> float:
        """User + system time of its brokers so far."""

    def rss_anon_mib(self) -> float:
        """Memory of its brokers."""

    def own_figures(self) -> dict[str, float]:
        """What it alone can tell after the timed section."""

    def tail(self) -> str:
        """The end of its log."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Server(ABC):
    """A process; entering starts it and returns when it serves, leaving ends it."""

    system: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.restarts = 0
        self.start_seconds = 0.0
        self.serving_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def serves(self) -> bool:
        """Whether it answers a client now."""

    @property
    def url(self) -> str:
        return f"kiteq://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.system}.log"

    def start(self) -> float:
        """Start it; return the seconds until it served."""
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(self.command(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while not self.serves():
            if not self.alive():
                raise BenchmarkError(f"{self.system} did not start; it said:\n{self.tail()}")
            if time.monotonic() - began > START_SECONDS_MAX:
                raise BenchmarkError(f"{self.system} does not serve after {START_SECONDS_MAX:.0f} s:\n{self.tail()}")
            time.sleep(POLL_SECONDS)
        self.serving_at = time.monotonic()
        self.start_seconds = self.serving_at - began
        return self.start_seconds

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def restart(self) -> float:
        self.restarts += 1
        return self.start()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise BenchmarkError(
                f"{self.system} did not stop within {STOP_SECONDS_MAX:.0f} s:\n{self.tail()}"
            ) from None

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)

    def rss_anon_mib(self) -> float:
        return rss_anon_mib(self.pid)

    def own_figures(self) -> dict[str, float]:
        return {}

    def tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return "\n".join(lines[-20:])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


class KiteqServer(Server):
    """`python -m kiteq` of this very environment.

    arguments: more words of its command line. broker_id: as it calls itself, once it serves.
    """

    system = "kiteq"

    def __init__(
        self, folder: Path, *, database: str | None = None, flush: str = "sync", arguments: Sequence[str] = ()
    ) -> None:
        super().__init__(folder)
        self.database = database or f"lmdb://{folder / 'data'}"
        self.flush = flush
        self.broker_id = ""
        self._arguments = arguments

    def command(self) -> list[str]:
        words = ["--bind", f"127.0.0.1:{self.port}", "--db", self.database, "--flush", self.flush]
        return [sys.executable, "-m", "kiteq", *words, *self._arguments]

    def serves(self) -> bool:
        hello = Hello(1, PROTOCOL, [WIRE_VERSION], os.urandom(16), "benchmark-probe", [], [], 0, 1)
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(encode_packet(hello))
                decoder = Decoder(HELLO_FRAME_BYTES_MAX)
                while chunk := connection.recv(4096):
                    if packets := decoder.feed(chunk):
                        if isinstance(packets[0], Welcome):
                            self.broker_id = packets[0].broker
                            return True
                        raise BenchmarkError(f"the broker refused the probe: {packets[0]}")
        except (OSError, KiteQError):
            return False
        return False


class RedisServer(Server):
    """Debian's redis-server, fsync of its log before each answer, no snapshots."""

    system = "redis"

    def command(self) -> list[str]:
        program = shutil.which("redis-server")
        if program is None:
            raise BenchmarkError("there is no redis-server here: apt install redis-server")
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
        }
        return [program, *(word for name, value in settings.items() for word in (f"--{name}", value))]

    def serves(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False
