"""Several brokers under test: found through a ZooKeeper of their own, or behind one command."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError

from benchmark.harness.process import ROOT, children, cpu_seconds, free_neighbours, rss_anon_mib
from benchmark.harness.servers import POLL_SECONDS, START_SECONDS_MAX, BenchmarkError, KiteqServer, Server
from kiteq.registry.layout import EVERY_TOPIC, SERVERS

JARS: Final = Path("/usr/share/java")
NEEDED_JARS: Final = (
    "zookeeper", "zookeeper-jute", "slf4j-api", "slf4j-simple", "metrics-core", "snappy-java", "commons-cli",
    "commons-io", "netty-common", "netty-buffer", "netty-codec", "netty-handler", "netty-resolver", "netty-transport",
    "log4j-1.2",
)  # fmt: skip
QUESTION_SECONDS_MAX: Final = 30.0


def accepted(url: str) -> dict[str, int]:
    """Return how many messages each broker has accepted since it was started, by its id."""
    command = [sys.executable, "-m", "kiteq", "stat", "--json", "--broker", url]
    try:
        said = subprocess.run(
            command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=QUESTION_SECONDS_MAX
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"`kiteq stat --broker {url}` does not end") from None
    if said.returncode:
        raise BenchmarkError(f"`kiteq stat --broker {url}` failed: {said.stderr}")
    answer: Any = json.loads(said.stdout)
    brokers = answer if isinstance(answer, list) else [answer]
    return {one["broker_id"]: one["counters"].get("accepted", 0) for one in brokers}


def _shares(url: str) -> dict[str, float]:
    counts = sorted(accepted(url).values())
    return {"share_least": counts[0] / sum(counts), "share_most": counts[-1] / sum(counts)}


class ZooKeeperServer(Server):
    """One ZooKeeper with its usual settings, from Debian's packages."""

    system = "zookeeper"

    @property
    def url(self) -> str:
        return f"zk://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        java = shutil.which("java")
        if java is None or not (JARS / "zookeeper.jar").exists():
            raise BenchmarkError("there is no ZooKeeper here: apt install zookeeper")
        settings = {
            "dataDir": str(self.folder / "data"),
            "clientPort": str(self.port),
            "clientPortAddress": "127.0.0.1",
            "admin.enableServer": "false",
            "4lw.commands.whitelist": "srvr",
        }
        path = self.folder / "zoo.cfg"
        path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        classes = ":".join(str(JARS / f"{name}.jar") for name in NEEDED_JARS)
        return [java, "-Xmx128m", "-cp", classes, "org.apache.zookeeper.server.quorum.QuorumPeerMain", str(path)]

    def serves(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(b"srvr")
                answer = b""
                while chunk := connection.recv(65_536):
                    answer += chunk
        except OSError:
            return False
        return b"Mode: " in answer


class Cluster:
    """Brokers that share their bindings through a ZooKeeper, and are found there."""

    system = "kiteq"
    port = 0

    def __init__(self, folder: Path, count: int, *, flush: str = "sync") -> None:
        self.folder = folder
        self.flush = flush
        self.zookeeper = ZooKeeperServer(folder / "zookeeper")
        self.brokers = [self.broker(f"broker-{number}") for number in range(1, count + 1)]
        self._living = ExitStack()

    def broker(self, name: str) -> KiteqServer:
        """Return one more broker of this cluster; it is started by entering it."""
        arguments = ("--zkhost", f"127.0.0.1:{self.zookeeper.port}")
        return KiteqServer(self.folder / name, flush=self.flush, arguments=arguments)

    @property
    def url(self) -> str:
        return self.zookeeper.url

    @property
    def restarts(self) -> int:
        return sum(broker.restarts for broker in self.brokers)

    def alive(self) -> bool:
        return all(broker.alive() for broker in self.brokers)

    def restart(self) -> float:
        return max(broker.restart() for broker in self.brokers if not broker.alive())

    def cpu_seconds(self) -> float:
        return sum(broker.cpu_seconds() for broker in self.brokers)

    def rss_anon_mib(self) -> float:
        return sum(broker.rss_anon_mib() for broker in self.brokers)

    def own_figures(self) -> dict[str, float]:
        return _shares(self.url)

    def tail(self) -> str:
        return "\n".join(broker.tail() for broker in self.brokers)

    def wait_announced(self) -> None:
        """Return when clients find every broker."""
        wanted = {f"127.0.0.1:{broker.port}" for broker in self.brokers}
        deadline = time.monotonic() + START_SECONDS_MAX
        client = KazooClient(f"127.0.0.1:{self.zookeeper.port}", read_only=True)
        client.start(timeout=START_SECONDS_MAX)
        try:
            while not wanted <= _announced(client):
                if time.monotonic() > deadline:
                    raise BenchmarkError(f"the brokers are not in {self.url}:\n{self.tail()}")
                time.sleep(POLL_SECONDS)
        finally:
            client.stop()
            client.close()

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            starting.callback(shutil.rmtree, self.folder, ignore_errors=True)
            for server in (self.zookeeper, *self.brokers):
                starting.enter_context(server)
            self.wait_announced()
            self._living = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._living.__exit__(kind, error, trace)


def _announced(client: Any) -> set[str]:
    try:
        return set(client.get_children(f"{SERVERS}/{EVERY_TOPIC}"))
    except NoNodeError:
        return set()


class WorkersServer(KiteqServer):
    """`kiteq --workers N`: several brokers behind one command, on ports that follow each other."""

    def __init__(self, folder: Path, count: int, *, flush: str = "sync") -> None:
        super().__init__(folder, flush=flush, arguments=("--workers", str(count)))
        self.port = free_neighbours(count)
        self._count = count

    def serves(self) -> bool:
        """Whether all of them do, which the command says each time it was started."""
        return self.log_path.read_text().count(" serves on ") > self.restarts and super().serves()

    def cpu_seconds(self) -> float:
        return sum(cpu_seconds(pid) for pid in (self.pid, *children(self.pid)))

    def rss_anon_mib(self) -> float:
        return sum(rss_anon_mib(pid) for pid in (self.pid, *children(self.pid)))

    def own_figures(self) -> dict[str, float]:
        return _shares(f"127.0.0.1:{self.port}")
