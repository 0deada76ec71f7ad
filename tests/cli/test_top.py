"""`kiteq top` with real brokers."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import environment, kiteq, listening, refused, run
from tests.support.broker import BrokerProcess, free_port
from tests.workers.parts import WorkerSet

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 20.0
DONE_SECONDS = 30.0


class Samples:
    """The lines of a running `kiteq top --json`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        sample: dict[str, Any] = json.loads(self.process.stdout.readline())
        return sample

    def until_states(self, *states: str) -> dict[str, Any]:
        """Return the next sample in which the brokers are in these states, by address."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            sample = self.next()
            told = {row["address"]: row["state"] for row in sample["brokers"]}
            if sorted(told.values()) == sorted(states):
                return sample
            assert time.monotonic() < deadline, f"waited in vain for {states}: {told}"


@contextmanager
def watching(named: str, *words: str) -> Iterator[Samples]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kiteq", "top", "--json", "--interval", "200ms", "--broker", named, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Samples(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DONE_SECONDS)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate(timeout=DONE_SECONDS)


def test_one_page_has_rates_of_one_interval(broker: BrokerProcess) -> None:
    with listening(broker, "trade", "pay", "--group", "members"):
        pass
    run(broker, "send", "trade", "pay")
    text = run(broker, "top", "--once", "--interval", "100ms")
    assert f" UTC  brokers: 1 ok  {broker.address}\n" in text
    assert re.search(rf"^{broker.address}  ok +0 +0  embedded +1 ", text, re.MULTILINE)
    assert re.search(r"^trade +0 +0 +1 +\d+B +\d+s +0 +0$", text, re.MULTILINE)
    assert re.search(r"^members +0 +1 +\d+B +0 +0 +0 +0$", text, re.MULTILINE)
    (line,) = run(broker, "top", "--once", "--json", "--interval", "100ms").splitlines()
    assert json.loads(line)["topics"][0]["in_per_s"] == 0.0


def test_rates_tell_what_was_sent_and_acked_meanwhile(broker: BrokerProcess) -> None:
    with watching(broker.address) as samples, listening(broker, "trade", "--count", "3") as listener:
        assert samples.next()["totals"]["in_per_s"] is None
        for _ in range(3):
            run(broker, "send", "trade", "pay")
        listener.communicate(timeout=DONE_SECONDS)
        # Everything that was counted is in some interval; the sums of the rates over all of them are the counts.
        counted = {"in": 0.0, "out": 0.0, "topic": 0.0}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while min(counted.values()) < 2.5:
            sample = samples.next()
            seconds = sample["interval_s"]
            counted["in"] += sample["totals"]["in_per_s"] * seconds
            counted["out"] += sample["totals"]["out_per_s"] * seconds
            counted["topic"] += sum(row["in_per_s"] for row in sample["topics"]) * seconds
            assert time.monotonic() < deadline, counted
    assert max(counted.values()) < 3.5


def test_a_broker_that_dies_is_shown_as_not_reached_and_comes_back(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    with (
        BrokerProcess(folders[0]) as one,
        BrokerProcess(folders[1], database="memory://") as other,
        watching(f"kiteq://{one.address},{other.address}") as samples,
    ):
        samples.until_states("ok", "ok")
        one.kill()
        first = samples.until_states("ok", "not reached")
        later = samples.next()
        ages = [
            row["lost_s"] for sample in (first, later) for row in sample["brokers"] if row["address"] == one.address
        ]
        assert ages[0] < ages[1]
        one.start()
        rows = {row["address"]: row for row in samples.until_states("ok", "ok")["brokers"]}
        assert rows[one.address]["epoch"] == 2
        os.kill(other.pid, signal.SIGSTOP)
        try:
            samples.until_states("ok", "not reached")
        finally:
            os.kill(other.pid, signal.SIGCONT)
        samples.until_states("ok", "ok")


def test_once_tells_by_its_status_that_a_broker_was_not_reached(broker: BrokerProcess) -> None:
    named = f"kiteq://{broker.address},127.0.0.1:{free_port()}"
    done = kiteq(broker.folder, "top", "--once", "--interval", "100ms", "--broker", named)
    assert (done.returncode, done.stderr) == (1, "")
    assert "brokers: 1 not reached, 1 ok" in done.stdout


def test_nobody_there_at_the_start_is_one_sentence(tmp_path: Path) -> None:
    named = f"kiteq://127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    sentence = refused(tmp_path, "top", "--broker", named, status=1)
    assert sentence.startswith("none of 2 brokers can be asked; the first: no broker answers at ")
    sentence = refused(tmp_path, "top", "--interval", "1ms", status=2)
    assert sentence == "--interval is '1ms'; it must be a time from 0.1s to 1h, like 2s"


def test_workers_are_all_shown_and_a_broker_with_two_addresses_once(tmp_path: Path) -> None:
    with WorkerSet(tmp_path, 2, database="memory://") as workers:
        named = f"{workers.address_of(1)},localhost:{workers.port}"
        with watching(named) as samples:
            rows = samples.until_states("ok", "ok")["brokers"]
            assert [row["address"] for row in rows] == [workers.address_of(1), f"localhost:{workers.port}"]
            assert rows[0]["registry"]["degraded"] is False
            workers.kill_worker(0)
            samples.until_states("ok", "not reached")
            samples.until_states("ok", "ok")


def test_on_a_terminal_a_page_replaces_the_one_before_and_ctrl_c_leaves(broker: BrokerProcess) -> None:
    child, terminal = pty.fork()
    if not child:
        words = ["-m", "kiteq", "top", "--interval", "100ms", "--broker", broker.address]
        size = {"COLUMNS", "LINES"}  # else they would count, not the size of the terminal
        variables = {name: value for name, value in environment(TERM="xterm").items() if name not in size}
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 11, 50, 0, 0))
        os.execve(sys.executable, [sys.executable, *words], variables)
    written = b""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while written.count(b"\x1b[H") < 4:
        assert time.monotonic() < deadline, written
        if select.select([terminal], [], [], 0.1)[0]:
            written += os.read(terminal, 65_536)
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    lines = written.split(b"\x1b[H")[-2].decode().replace("\x1b[J", "").replace("\x1b[K", "").split("\r\n")
    assert lines[0].startswith("kiteq top")
    assert len(lines) <= 11
    assert max(map(len, lines)) <= 50
    assert b"Traceback" not in written


def test_whoever_reads_the_pages_may_go(broker: BrokerProcess) -> None:
    command = f"{sys.executable} -m kiteq top --interval 100ms --broker {broker.address} | head -1"
    done = subprocess.run(
        ["sh", "-c", command], env=environment(), capture_output=True, text=True, timeout=DONE_SECONDS, check=False
    )
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
