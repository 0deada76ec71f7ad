"""Several brokers and a ZooKeeper in a network of their own, which a test can kill, pause, drain and cut apart.

    with Cluster(tmp_path, brokers=3) as cluster:
        cluster.brokers[0].kill()
        with cluster.network.cut(to=cluster.brokers[1].zookeeper_host):
            ...

Every broker has an address of its own, and one of its own by which it reaches ZooKeeper, so that each line can be
cut alone: `broker.host`, and `broker.zookeeper_host`. Clients reach ZooKeeper at a third (`CLIENTS_ZOOKEEPER_HOST`).
Sessions with ZooKeeper last one second.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError

from kiteq.registry.layout import BINDINGS, SERVERS
from tests.support.broker import BrokerProcess, greet
from tests.support.namespaces import Network
from tests.support.zookeeper import Ensemble, ZooKeeperProcess

__all__ = ["CLIENTS_ZOOKEEPER_HOST", "SESSION_SECONDS", "TOPICS", "Cluster", "ClusterBroker", "Registered"]

SESSION_SECONDS: Final = 1
TOPICS: Final = ("orders", "events")
PORT: Final = 13_800
CLIENTS_ZOOKEEPER_HOST: Final = "127.0.2.1"
EVERY_ADDRESS: Final = "0.0.0.0"
WAIT_SECONDS_MAX: Final = 60.0
POLL_SECONDS: Final = 0.05


class Registered(NamedTuple):
    """What stands in ZooKeeper. brokers: addresses that serve all topics. groups: bound in each of some topics."""

    brokers: set[str]
    groups: dict[str, set[str]]


class ClusterBroker(BrokerProcess):
    """One broker of a cluster. number: from 1 on."""

    def __init__(
        self,
        network: Network,
        folder: Path,
        number: int,
        zookeeper: Sequence[int],
        *,
        environment: Mapping[str, str],
    ) -> None:
        self.zookeeper_host = f"127.0.1.{number}"
        registry = ",".join(f"{self.zookeeper_host}:{port}" for port in zookeeper)
        arguments = ("--zkhost", registry, "--zk-timeout", f"{SESSION_SECONDS}s", "--topics", ",".join(TOPICS))
        super().__init__(folder, *arguments, environment=dict(environment))
        self.host = f"127.0.0.{10 + number}"
        self.port = PORT
        self.number = number
        self.id = ""
        """What it calls itself, once it was started."""
        self._network = network

    def start(self) -> None:
        """Start it in the cluster's network; see `BrokerProcess.start`."""
        self._network.inside(super().start)
        self.id = self._network.inside(lambda: greet(self.host, self.port, timeout=10.0)).broker

    def pause(self) -> None:
        """Stop the process where it is; its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on."""
        os.kill(self.pid, signal.SIGCONT)


class Cluster:
    """`brokers` brokers, and one ZooKeeper node, or three that elect a leader.

    folder: for the brokers. environment: of the brokers. later: how many of them the test starts itself.
    """

    def __init__(
        self,
        folder: Path,
        *,
        brokers: int = 3,
        later: int = 0,
        ensemble: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.network = Network()
        self.zookeeper: ZooKeeperProcess | Ensemble = Ensemble() if ensemble else ZooKeeperProcess()
        for node in self.nodes:
            node.host = EVERY_ADDRESS
        self.brokers: list[ClusterBroker] = []
        self._later = later
        ports = [node.port for node in self.nodes]
        for number in range(1, brokers + 1):
            own = folder / f"broker-{number}"
            own.mkdir()
            self.brokers.append(ClusterBroker(self.network, own, number, ports, environment=environment or {}))
        self.registry = "zk://" + ",".join(f"{CLIENTS_ZOOKEEPER_HOST}:{port}" for port in ports)
        """As clients name it."""
        self._lifetime = ExitStack()

    @property
    def nodes(self) -> list[ZooKeeperProcess]:
        """The nodes of ZooKeeper."""
        return self.zookeeper.nodes if isinstance(self.zookeeper, Ensemble) else [self.zookeeper]

    @property
    def ensemble(self) -> Ensemble:
        """ZooKeeper, where it is an ensemble."""
        assert isinstance(self.zookeeper, Ensemble)
        return self.zookeeper

    def start_zookeeper(self) -> None:
        """Start ZooKeeper, or those of its nodes that do not run, and return when it serves."""
        self.network.inside(self.zookeeper.start)

    def leader(self) -> ZooKeeperProcess:
        """Return the node that leads, waiting until there is one."""
        return self.network.inside(self.ensemble.leader)

    def start_brokers(self, brokers: Sequence[ClusterBroker]) -> None:
        """Start brokers at the same time, and return when they greet clients."""
        with ThreadPoolExecutor(len(brokers)) as threads:
            for started in [threads.submit(broker.start) for broker in brokers]:
                started.result()

    @contextmanager
    def zookeeper_paused(self) -> Iterator[None]:
        """Let ZooKeeper stand still, its connections open, until the block ends."""
        for node in self.nodes:
            node.pause()
        try:
            yield
        finally:
            for node in self.nodes:
                node.resume()

    def registered(self) -> Registered:
        """Return what stands in ZooKeeper now."""
        return self.network.inside(self._read_registry)

    def _read_registry(self) -> Registered:
        client = KazooClient(self.registry.removeprefix("zk://"), timeout=WAIT_SECONDS_MAX)
        client.start(WAIT_SECONDS_MAX)
        try:
            served = [set(_children(client, f"{SERVERS}/{topic}")) for topic in TOPICS]
            groups = {topic: set(_children(client, f"{BINDINGS}/{topic}")) for topic in TOPICS}
        finally:
            client.stop()
            client.close()
        return Registered(set.intersection(*served), groups)

    def wait_registered(self, brokers: Iterable[ClusterBroker] | None = None) -> None:
        """Wait until these brokers, all unless some are named, are announced, and no other one."""
        wanted = {broker.address for broker in (self.brokers if brokers is None else brokers)}
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while (registered := self.registered()).brokers != wanted:
            assert time.monotonic() < deadline, f"announced are {registered.brokers}\n{self.logs()}"
            time.sleep(POLL_SECONDS)

    def logs(self) -> str:
        """Return what the brokers have printed."""
        return "\n".join(f"--- broker {broker.number}\n{broker.log()}" for broker in self.brokers)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.network)
            stack.callback(self.zookeeper.close)
            for broker in self.brokers:
                stack.callback(broker.close)
            self.start_zookeeper()
            self.start_brokers(self.brokers[: len(self.brokers) - self._later])
            self._lifetime = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lifetime.close()


def _children(client: KazooClient, path: str) -> list[str]:
    try:
        found: list[str] = client.get_children(path)
    except NoNodeError:
        return []
    return found
