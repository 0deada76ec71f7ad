"""A real ZooKeeper for tests: one node, or an ensemble of three, as plain processes on free ports.

    with ZooKeeperProcess() as zookeeper:
        ...                         # zookeeper.address is "127.0.0.1:<port>"
        zookeeper.kill()            # as kill -9 does
        zookeeper.wipe()            # all data gone
        zookeeper.start()           # same port

Under trio the waiting methods are called in a thread: `await trio.to_thread.run_sync(zookeeper.start)`.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from tests.support.broker import free_port
from tests.support.database import program

__all__ = ["Ensemble", "ZooKeeperFailed", "ZooKeeperProcess"]

JARS: Final = Path("/usr/share/java")
NEEDED_JARS: Final = (
    "zookeeper", "zookeeper-jute", "slf4j-api", "slf4j-simple", "metrics-core", "snappy-java", "commons-cli",
    "commons-io", "netty-common", "netty-buffer", "netty-codec", "netty-handler", "netty-resolver", "netty-transport",
    "log4j-1.2",
)  # fmt: skip
TICK_MS: Final = 200
"""Sessions expire on a tick: small, so that a session timeout of one second is kept well."""
READY_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.02


class ZooKeeperFailed(AssertionError):
    """A node did not start as it should; the text ends with its log."""


class ZooKeeperProcess:
    """One node; its data is in a new folder that is deleted at the end.

    users: password by name, for SASL digest. sasl: "optional"; "required": refuse whoever does not log in;
    "lenient": whoever fails to log in stays as a nobody.
    member: (own number, address lines of all members) in an ensemble.
    """

    def __init__(
        self,
        *,
        users: Mapping[str, str] | None = None,
        sasl: Literal["optional", "required", "lenient"] = "optional",
        member: tuple[int, Sequence[str]] | None = None,
    ) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="kiteq-test-"))
        self._member = member
        self._users = users
        self._sasl = sasl
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Host and port, as clients take them."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the node."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process exists and has not ended."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Return what the node has printed over all its starts."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def launch(self) -> None:
        """Start the process and return at once."""
        assert not self.is_running
        self._write_files()
        classes = ":".join([str(self.folder), *(str(JARS / f"{name}.jar") for name in NEEDED_JARS)])
        command = [
            program("java"), "-Xmx64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto",
            "-Dzookeeper.forceSync=no",  # a test kills processes, not the machine
        ]  # fmt: skip
        if self._users is not None:
            command += [
                f"-Djava.security.auth.login.config={self.folder / 'jaas.conf'}",
                "-Dzookeeper.authProvider.1=org.apache.zookeeper.server.auth.SASLAuthenticationProvider",
                f"-Dzookeeper.sessionRequireClientSASLAuth={str(self._sasl == 'required').lower()}",
                f"-Dzookeeper.allowSaslFailedClients={str(self._sasl == 'lenient').lower()}",
            ]
        main = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-cp", classes, main, str(self.folder / "zoo.cfg")],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _write_files(self) -> None:
        settings = [
            f"tickTime={TICK_MS}",
            "minSessionTimeout=500",
            "maxSessionTimeout=60000",
            f"dataDir={self.folder / 'data'}",
            f"clientPort={self.port}",
            f"clientPortAddress={self.host}",
            "admin.enableServer=false",
            "maxClientCnxns=0",
            "4lw.commands.whitelist=ruok,srvr",
        ]
        data = self.folder / "data"
        data.mkdir(exist_ok=True)
        if self._member is not None:
            number, members = self._member
            settings += ["initLimit=50", "syncLimit=10", "standaloneEnabled=false", *members]
            (data / "myid").write_text(str(number))
        if self._users is not None:
            lines = "\n".join(f'  user_{name}="{password}"' for name, password in self._users.items())
            text = f"Server {{\n  org.apache.zookeeper.server.auth.DigestLoginModule required\n{lines};\n}};\n"
            (self.folder / "jaas.conf").write_text(text)
        (self.folder / "zoo.cfg").write_text("\n".join(settings) + "\n")

    def start(self) -> None:
        """Start the process and return when it serves."""
        self.launch()
        self.wait_until(lambda mode: mode is not None, "it serves")

    def mode(self) -> str | None:
        """Return "standalone", "leader" or "follower", or None while the node does not serve."""
        try:
            with socket.create_connection((self.host, self.port), 1.0) as connection:
                connection.sendall(b"srvr")
                answer = b""
                while chunk := connection.recv(65_536):
                    answer += chunk
        except OSError:
            return None
        for line in answer.decode().splitlines():
            if line.startswith("Mode: "):
                return line.removeprefix("Mode: ")
        return None

    def wait_until(self, holds: Callable[[str | None], bool], what: str) -> None:
        """Wait until the mode of the node is as wanted."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not holds(self.mode()):
            if not self.is_running or time.monotonic() > deadline:
                raise ZooKeeperFailed(f"the node at {self.address} does not come to where {what}:\n{self.log()}")
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """End the process at once, as `kill -9` does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask the process to end and wait until it has."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Stop the process where it is; its connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Delete the data of a process that has ended."""
        assert not self.is_running
        shutil.rmtree(self.folder / "data")

    def close(self) -> None:
        """End the process, if it runs, and delete its folder."""
        if self.is_running:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(STOP_SECONDS_MAX)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Ensemble:
    """Three nodes that elect a leader."""

    def __init__(self) -> None:
        members = [f"server.{number}=127.0.0.1:{free_port()}:{free_port()}" for number in (1, 2, 3)]
        self.nodes = [ZooKeeperProcess(member=(number, members)) for number in (1, 2, 3)]

    @property
    def address(self) -> str:
        """The addresses of all nodes, as clients take them."""
        return ",".join(node.address for node in self.nodes)

    def start(self) -> None:
        """Start the nodes that do not run and return when all serve."""
        for node in self.nodes:
            if not node.is_running:
                node.launch()
        for node in self.nodes:
            node.wait_until(lambda mode: mode is not None, "it serves")

    def leader(self) -> ZooKeeperProcess:
        """Return the node that leads, waiting until there is one."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        while time.monotonic() < deadline:
            for node in self.nodes:
                if node.is_running and node.mode() == "leader":
                    return node
            time.sleep(POLL_SECONDS)
        raise ZooKeeperFailed(f"no leader was elected:\n{''.join(node.log() for node in self.nodes)}")

    def close(self) -> None:
        """End all nodes and delete their data."""
        for node in self.nodes:
            with suppress(OSError):
                node.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
