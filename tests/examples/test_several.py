"""`examples/several.py` with several brokers of which one is killed, as in the README."""

from __future__ import annotations

import re
import shlex
import signal
from pathlib import Path
from typing import Final

import pytest

from tests.cli.running import kiteq
from tests.examples.programs import ROOT, Program, Stage, until
from tests.examples.test_readme import blocks, section
from tests.workers.parts import WorkerSet

pytestmark = pytest.mark.slow

PROGRAM: Final = str(ROOT / "examples" / "several.py")
KITEQ: Final = ".venv/bin/kiteq "


def count(program: Program, verb: str) -> int:
    """Return the number that the program has printed last."""
    found = re.findall(rf"^(\d+) {verb}", program.output, re.MULTILINE)
    return int(found[-1]) if found else 0


def test_a_killed_broker_costs_nothing_that_was_sent(tmp_path: Path) -> None:
    with Stage(tmp_path, brokers := WorkerSet(tmp_path, 2)).open() as stage:
        consumer = stage.start(PROGRAM, "consume")
        consumer.wait_for(f"connected: {' '.join(brokers.addresses)}")
        producer = stage.start(PROGRAM, "produce")
        until(lambda: count(producer, "sent") > 0, lambda: producer.output)
        worker = brokers.worker(1)
        assert worker is not None
        worker.kill()
        before = count(producer, "sent")
        until(lambda: count(producer, "sent") > before + 200, lambda: producer.output)
        producer.process.send_signal(signal.SIGINT)
        assert producer.process.wait(30) == 0, producer.output
        sent = count(producer, "sent")
        until(lambda: count(consumer, "received") >= sent, lambda: f"{producer.output}\n{consumer.output}")
        consumer.stop()


def test_the_commands_of_the_readme_are_taken(tmp_path: Path) -> None:
    lines = [line for block in blocks(section("Several brokers"), "sh") for line in block.splitlines()]
    serving = [shlex.split(line.removeprefix(KITEQ)) for line in lines if line.startswith(f"{KITEQ}--")]
    assert len(serving) == 3
    for words in serving:
        done = kiteq(tmp_path, "config", "check", *words)
        assert (done.returncode, done.stderr) == (0, "")
