"""A real broker in a process of its own, which a test can stop, kill and start again.

    with BrokerProcess(tmp_path) as broker:
        ...                     # broker.address is "127.0.0.1:<port>"
        broker.kill()           # as kill -9 does
        broker.start()          # same folder, same port

Under trio the waiting methods are called in a thread: `await trio.to_thread.run_sync(broker.start)`,
or the whole life at once: `async with BrokerProcess(tmp_path) as broker:`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgpack
import trio

from kiteq.errors import RemoteProtocolError
from kiteq.limits import HELLO_FRAME_BYTES_MAX
from kiteq.remoting.codec import Decoder
from kiteq.remoting.packets import PROTOCOL, TYPE_NUMBERS, WIRE_VERSION, Hello, Packet, Refusal, Welcome

__all__ = ["DISK_FREE_MIN", "BrokerFailed", "BrokerProcess", "free_port", "greet"]

READY_SECONDS_MAX: Final = 30.0
"""From start to the first Welcome: generous, because several test processes share few cores."""
STOP_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.02
DISK_FREE_MIN: Final = 64 << 20
"""Bytes, for `disk_free_min`: 5 % of a disk that others fill too is no reason for a test to fail."""


class BrokerFailed(AssertionError):
    """The broker did not start or stop as it should; the text ends with its log."""


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def greet(host: str, port: int, *, timeout: float = 1.0) -> Welcome:
    """Connect as a client without topics or bindings and return the answer of the broker.

    Raises `OSError` when nothing answers, `BrokerFailed` when the broker refuses.
    """
    hello = Hello(1, PROTOCOL, [WIRE_VERSION], os.urandom(16), "readiness-probe", [], [], 0, 1)
    # Packed here, not by the codec: its packer belongs to one thread, and this may run in another.
    frame: bytes = msgpack.packb([TYPE_NUMBERS[Hello], *hello])
    decoder = Decoder(HELLO_FRAME_BYTES_MAX)
    with socket.create_connection((host, port), timeout) as connection:
        connection.sendall(len(frame).to_bytes(4, "big") + frame)
        packets: list[Packet] = []
        while not packets:
            chunk = connection.recv(65_536)
            if not chunk:
                raise ConnectionResetError("the broker closed the connection before it answered")
            packets = decoder.feed(chunk)
    answer = packets[0]
    if isinstance(answer, Refusal):
        raise BrokerFailed(f"the broker refused the greeting: {answer}")
    if not isinstance(answer, Welcome):
        raise BrokerFailed(f"the broker answered a greeting with {answer}")
    return answer


class BrokerProcess:
    """One broker on a folder and a port, both kept over restarts.

    folder: holds the store (`store/`) and the log (`broker.log`) of the process.
    arguments: more words of the command line. database: another store URL than that folder.
    module: what Python runs; it must understand the command line of `kiteq`.
    ready: False for a broker that refuses plain clients; `start` then waits for the port only.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        database: str | None = None,
        environment: dict[str, str] | None = None,
        ready: bool = True,
        module: str = "kiteq",
    ) -> None:
        self.folder = folder
        self.host = "127.0.0.1"
        self.port = free_port()
        self.log_path = folder / "broker.log"
        self.database = database or f"lmdb://{folder / 'store'}"
        self._arguments = arguments
        self._environment = environment or {}
        self._ready = ready
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Host and port, as `--broker` and client addresses take them."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running broker."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        """Whether the process exists and has not ended."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Return everything the broker has printed, over all its starts."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self) -> None:
        """Start the broker and return when it greets a client; also starts it again after an end."""
        if self.is_running:
            raise BrokerFailed("the broker is running already")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KITEQ_")}
        command = [sys.executable, "-m", self._module, "--bind", self.address, "--db", self.database, *self._arguments]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment | {"KITEQ_DISK_FREE_MIN": str(DISK_FREE_MIN)} | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    def kill(self) -> None:
        """End the process at once, as `kill -9` does."""
        process = self._running()
        process.kill()
        process.wait(STOP_SECONDS_MAX)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask the broker to drain, wait until it has ended and return its exit status."""
        process = self._running()
        process.send_signal(number)
        return self.wait()

    def wait(self, timeout: float = STOP_SECONDS_MAX) -> int:
        """Wait until the process has ended by itself; return its exit status."""
        if self._process is None:
            raise BrokerFailed("the broker was never started")
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BrokerFailed(f"the broker did not end within {timeout} s; its log:\n{self.log()}") from None

    def restart(self) -> None:
        """Drain, end and start again on the same folder and port."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End the process if it still runs; harmless otherwise."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(STOP_SECONDS_MAX)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await trio.to_thread.run_sync(self.start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self.close)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise BrokerFailed(f"the broker is not running; its log:\n{self.log()}")
        return self._process

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS_MAX
        while True:
            status = self._running_status()
            if status is not None:
                raise BrokerFailed(f"the broker ended with status {status} at start; its log:\n{self.log()}")
            try:
                if self._ready:
                    greet(self.host, self.port)
                else:
                    socket.create_connection((self.host, self.port), 1.0).close()
            except (OSError, RemoteProtocolError) as error:
                if time.monotonic() > deadline:
                    raise BrokerFailed(f"no broker at {self.address}: {error}; its log:\n{self.log()}") from error
                time.sleep(POLL_SECONDS)
            else:
                return

    def _running_status(self) -> int | None:
        return None if self._process is None else self._process.poll()
