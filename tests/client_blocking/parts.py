"""What the tests of the blocking client share."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from kiteq_client import Decision, Message, Received, fanout
from kiteq_client.blocking import Client

ROOT: Final = Path(__file__).resolve().parent.parent.parent
SECONDS_MAX: Final = 30.0
"""Until a wait is a failure: generous, as several test processes share few cores."""


class Place(NamedTuple):
    """Where a test sends and receives."""

    address: str
    topic: str
    group: str

    def client(self, **arguments: Any) -> Client:
        return Client(self.address, group=self.group, **arguments)

    def message(self, body: bytes | str = b"", **arguments: Any) -> Message:
        return Message(self.topic, "pay", body, **arguments)


def until(condition: Callable[[], object], say: Callable[[], str] = lambda: "it did not happen") -> None:
    """Wait for what happens in another thread or process."""
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.002)


class Running:
    """A function in threads; their errors are raised by `join`."""

    def __init__(self, function: Callable[[int], object], count: int = 1) -> None:
        self.results: dict[int, object] = {}
        self.errors: dict[int, BaseException] = {}
        self._threads = [threading.Thread(target=self._run, args=(function, number)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, function: Callable[[int], object], number: int) -> None:
        try:
            self.results[number] = function(number)
        except BaseException as error:  # noqa: BLE001 raised again by `join`
            self.errors[number] = error

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(SECONDS_MAX)
            assert not thread.is_alive()

    def join(self) -> None:
        self.wait()
        for error in self.errors.values():
            raise error


def _command(program: str, place: Place) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a program that knows `address`, `topic`, `group` and `message()`."""
    head = f"""\
import logging, os, signal, sys, threading, time
from kiteq_client import *
from kiteq_client import blocking
address, topic, group = {place.address!r}, {place.topic!r}, {place.group!r}
logging.getLogger("kiteq_client").setLevel(logging.ERROR)
def message(body=b""):
    return Message(topic, "pay", body)
"""
    path = os.pathsep.join((str(ROOT), str(ROOT / "client")))
    # From Python 3.12 on every fork of a process with threads warns.
    warning = "ignore:This process:DeprecationWarning"
    return [sys.executable, "-u", "-W", warning, "-c", head + textwrap.dedent(program)], os.environ | {
        "PYTHONPATH": path
    }


def run_program(program: str, place: Place, *, status: int = 0) -> list[str]:
    """Run a program to its end; return the lines it printed, sorted, as processes print in any order."""
    command, environment = _command(program, place)
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (status, ""), result.stdout + result.stderr
    return sorted(result.stdout.splitlines())


@contextmanager
def started(program: str, place: Place) -> Iterator[subprocess.Popen[str]]:
    """Start a program and return when it has printed "ready"; it is killed in the end if it still runs."""
    command, environment = _command(program, place)
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(SECONDS_MAX, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
            yield process
        finally:
            watchdog.cancel()
            process.kill()


class OwnError(Exception):
    pass


def texts(client: Client, place: Place) -> list[str]:
    """Return what is delivered of what was sent before this call."""
    client.send(place.message("mark"))
    found: list[str] = []
    for delivery in client.deliveries():
        delivery.ack()
        if delivery.text == "mark":
            break
        found.append(delivery.text)
    return found


def opened(place: Place, **arguments: object) -> Client:
    return place.client(topics=[place.topic], bindings=[fanout(place.topic)], **arguments)


class Checks:
    """A check function that answers as told and keeps who was asked for."""

    def __init__(self, answer: Decision) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def __call__(self, message: Received) -> Decision:
        self.asked.append(message.text)
        return self.answer
