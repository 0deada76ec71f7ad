"""A cluster under load, and the judgement of what programs saw of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from random import SystemRandom
from types import TracebackType
from typing import Final, NamedTuple, Self

from tests.cluster.application import BROKER_HISTORY, HISTORY, Plan
from tests.faults.history import (
    BrokerStarted,
    BrokerStopped,
    DecideOk,
    Delivered,
    Drained,
    Ended,
    Event,
    History,
    PublishOk,
    PublishRefused,
    PublishUnknown,
    Stalled,
    read_histories,
)
from tests.faults.several import Repeated, count_repeated, judge
from tests.support.cluster import SESSION_SECONDS, Cluster, ClusterBroker

__all__ = ["CHANGED", "OUTAGE_SECONDS", "PATIENT_TIMEOUT", "SEND_TIMEOUT", "Report", "Run", "running"]

ROOT: Final = Path(__file__).parent.parent.parent
STEP_SECONDS_MAX: Final = 90.0
POLL_SECONDS: Final = 0.05
ACK_DEADLINE: Final = 10.0
SEND_TIMEOUT: Final = 3.0
"""Of producers that are to give up now and then."""
PATIENT_TIMEOUT: Final = 20.0
"""Of producers of a run in which no send may fail: longer than a drain and a start on a busy machine."""
SILENCE_SECONDS_MAX: Final = 10.0
"""Between two receipts of all producers, which ask many times a second: far less than this, but for a busy machine."""
OUTAGE_SECONDS: Final = 5.0 * SESSION_SECONDS
STARTS: Final = "starts-{}.jsonl"
CHANGED: Final = "KITEQ_FAULTS_PACKAGES"
"""The environment variable that names a folder with changed packages, for brokers and programs."""
ENVIRONMENT: Final = {
    "KITEQ_ACK_DEADLINE": f"{ACK_DEADLINE}s",
    "KITEQ_CHECK_AFTER": "0.5s",
    "KITEQ_CHECK_ELSEWHERE_AFTER": "1s",
}


class Report(NamedTuple):
    """What a run had that no promise forbids. errors: that producers met."""

    errors: list[str]
    repeated: list[Repeated]


class Run:
    """Programs that work on a cluster, and the notes of a test about what it does to the brokers.

    timeout: of producers.
    """

    def __init__(self, cluster: Cluster, folder: Path, timeout: float = SEND_TIMEOUT) -> None:
        self.cluster = cluster
        self._folder = folder
        brokers = [broker.address for broker in cluster.brokers]
        there = [broker.address for broker in cluster.brokers if broker.is_running]
        seed = SystemRandom().randrange(1 << 32)
        print(f"seed {seed}")  # noqa: T201 pytest shows it when the test fails
        self._plan = Plan(cluster.registry, brokers, there, str(folder), timeout, ACK_DEADLINE, seed)
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = 0

    # --- the programs --------------------------------------------------------------------------
    def __enter__(self) -> Self:
        for broker in self.cluster.brokers:
            if broker.is_running:
                self._note(broker, BrokerStarted(time.monotonic(), broker.id))
        self.cluster.network.inside(self._launch)
        try:
            self._wait_answer("the groups are bound at every broker")
            self._command("produce")
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _launch(self) -> None:
        command = [sys.executable, "-m", "tests.cluster.application", json.dumps(asdict(self._plan))]
        with (self._folder / "answers").open("ab") as answers, (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": _python_path(*_changed(), ROOT)},
                stdin=subprocess.PIPE,
                stdout=answers,
                stderr=log,
            )

    def _command(self, word: str) -> list[str]:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()
        return self._wait_answer(word)

    def _wait_answer(self, what: str) -> list[str]:
        path = self._folder / "answers"
        self._until(lambda: path.read_bytes().count(b"\n") > self._answers, what)
        self._answers += 1
        errors: list[str] = json.loads(path.read_text().splitlines()[-1])["errors"]
        return errors

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        assert self._process is not None
        deadline = time.monotonic() + STEP_SECONDS_MAX
        while not holds():
            if self._process.poll() is not None or time.monotonic() > deadline:
                status = self._process.poll()
                text = f"the programs (status {status}) did not come to this: {what}; their log:\n{self.log()}"
                raise AssertionError(f"{text}\n{self.cluster.logs()}")
            time.sleep(POLL_SECONDS)

    def _leave(self) -> None:
        """Let the programs leave their clients, and end."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        status = self._process.wait(STEP_SECONDS_MAX)
        assert status == 0, f"the programs ended with status {status}; their log:\n{self.log()}"

    def _close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the programs stand still, their connections open, until the block ends."""
        assert self._process is not None
        with ExitStack() as stack:
            for broker in self.cluster.brokers:
                stack.enter_context(self._stalled(broker))
            self._process.send_signal(signal.SIGSTOP)
            stack.callback(self._process.send_signal, signal.SIGCONT)
            yield

    def log(self) -> str:
        """Return the end of what the programs logged."""
        return (self._folder / "log").read_text(errors="replace")[-20_000:]

    # --- what happens to brokers ---------------------------------------------------------------
    def _note(self, broker: ClusterBroker, event: Event) -> None:
        with History(self._folder / STARTS.format(broker.number)) as history:
            history.write(event)

    def kill(self, broker: ClusterBroker) -> None:
        """End a broker as `kill -9` does."""
        self._end(broker, broker.kill, "killed")

    def drain(self, broker: ClusterBroker) -> None:
        """Ask a broker to end, and wait until it has."""
        self._end(broker, lambda: broker.stop() and None, "drained")

    def _end(self, broker: ClusterBroker, end: Callable[[], object], how: str) -> None:
        began = time.monotonic()
        end()
        self._note(broker, BrokerStopped(time.monotonic(), began, how))

    def start(self, broker: ClusterBroker) -> None:
        """Start a broker, for the first time or again."""
        broker.start()
        self._note(broker, BrokerStarted(time.monotonic(), broker.id))

    @contextmanager
    def paused_broker(self, broker: ClusterBroker) -> Iterator[None]:
        """Let a broker stand still, its connections open, until the block ends."""
        with self._stalled(broker):
            broker.pause()
            try:
                yield
            finally:
                broker.resume()

    @contextmanager
    def out_of_reach(self, broker: ClusterBroker, *, requests: bool = True, answers: bool = True) -> Iterator[None]:
        """Drop what is sent to a broker, or what it sends to programs, or both, until the block ends."""
        to, answers_of = broker.host if requests else "", broker.host if answers else ""
        with self._stalled(broker), self.cluster.network.cut(to=to, answers_of=answers_of):
            yield

    @contextmanager
    def _stalled(self, broker: ClusterBroker) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._note(broker, Stalled(time.monotonic(), began))

    # --- what the programs see -----------------------------------------------------------------
    def events(self, since: float = 0.0) -> list[Event]:
        """Return what the programs have noted after a time."""
        return [event for event in read_histories([self._folder / HISTORY]) if event.at > since]

    def accept(self, count: int, *, by: ClusterBroker | None = None) -> None:
        """Wait until brokers, or one of them, have accepted so many messages more, and groups got as many."""
        what = f"{count} messages more are accepted{'' if by is None else f' by broker {by.number}'}"
        name = b"" if by is None else f'"{by.id}"]'.encode()
        accepted = delivered = 0
        with (self._folder / HISTORY).open("rb") as file:
            file.seek(0, os.SEEK_END)

            def reached() -> bool:
                nonlocal accepted, delivered
                lines = file.readlines()
                accepted += sum(line.startswith(b'["PublishOk"') and line.rstrip().endswith(name) for line in lines)
                delivered += sum(line.startswith(b'["Delivered"') for line in lines)
                return accepted >= count and delivered >= count

            self._until(reached, what)

    def go_on(self, seconds: float) -> None:
        """Let the programs work for so long; they never come to a stop."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.accept(SLICE)
            time.sleep(POLL_SECONDS)

    def assert_undisturbed(self, since: float) -> None:
        """Fail if after a time a program has met an error or a long silence, or an auditor has lost a connection."""
        events = self.events(since)
        failed = [event for event in events if isinstance(event, PublishRefused | PublishUnknown)]
        assert not failed, f"sends failed: {failed}"
        accepted = [event.at for event in events if isinstance(event, PublishOk)]
        longest = max(later - earlier for earlier, later in pairwise(accepted))
        assert longest < SILENCE_SECONDS_MAX, f"for {longest:.1f} s nothing was accepted"
        paths = [self._folder / BROKER_HISTORY.format(broker.number) for broker in self.cluster.brokers]
        ended = [event for event in read_histories(paths) if isinstance(event, Ended) and event.at > since]
        assert not ended, f"connections ended: {ended}"

    # --- the end -------------------------------------------------------------------------------
    def finish(self) -> Report:
        """Let the programs end their work; fail if a promise was broken."""
        errors = self._command("drain")
        self._leave()
        events = self.events()
        counted = {kind.__name__: sum(isinstance(event, kind) for event in events) for kind in COUNTED}
        programs = [self._folder / HISTORY]
        report = Report(errors, count_repeated(programs))
        print(counted, len(errors), report)  # noqa: T201 shown when the test fails
        numbers = [broker.number for broker in self.cluster.brokers]
        own = [[self._folder / STARTS.format(one), self._folder / BROKER_HISTORY.format(one)] for one in numbers]
        violations = [str(violation) for violation in judge(programs, own)]
        assert not violations, "\n".join(violations[:VIOLATIONS_SHOWN])
        ends = [
            event for event in read_histories(path for paths in own for path in paths) if isinstance(event, Drained)
        ]
        assert all(end.complete for end in ends), "the groups were not drained in time"
        assert counted["PublishOk"], "nothing was accepted: the run says nothing"
        assert counted["DecideOk"], "no transaction was decided: the run says nothing"
        return report


SLICE: Final = 20
"""Messages between two looks: accepting them takes much less than STEP_SECONDS_MAX."""
VIOLATIONS_SHOWN: Final = 20
COUNTED: Final = (PublishOk, PublishUnknown, PublishRefused, DecideOk, Delivered)


def _changed() -> list[Path]:
    return [Path(os.environ[CHANGED])] if CHANGED in os.environ else []


def _python_path(*folders: Path) -> str:
    return os.pathsep.join(str(path) for folder in folders for path in (folder, folder / "client"))


@contextmanager
def running(
    folder: Path,
    *,
    brokers: int = 3,
    later: int = 0,
    ensemble: bool = False,
    timeout: float = SEND_TIMEOUT,
    package: Path | None = None,
) -> Iterator[Run]:
    """Start a cluster and the programs on it. package: where the brokers' kiteq is, if it is a changed one."""
    folders = _changed() if package is None else [package]
    environment = ENVIRONMENT | {"PYTHONPATH": _python_path(*folders, ROOT)}
    with (
        Cluster(folder, brokers=brokers, later=later, ensemble=ensemble, environment=environment) as cluster,
        Run(cluster, folder, timeout) as run,
    ):
        yield run
