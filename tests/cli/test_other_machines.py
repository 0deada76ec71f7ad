"""Commands at an address of a broker that is none of loopback, as they are on another machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from tests.cli.running import kiteq
from tests.support.broker import BrokerProcess
from tests.support.namespaces import Network

pytestmark = pytest.mark.slow

HOST = "192.0.2.7"  # of a block that is kept for examples
HOW_TO_CHANGE = "only clients over loopback may administrate: run this on the broker's machine"

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("broker")
    broker = BrokerProcess(folder, "--insecure")
    broker.host = HOST
    with Network() as network, closing(broker):
        network.add_host(HOST)
        network.inside(broker.start)

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return network.inside(lambda: kiteq(folder, *words, KITEQ_BROKER=broker.address))

        assert run("send", "trade", "pay", "body").returncode == 0
        yield run


def test_figures_and_names_are_for_everybody(command: Command) -> None:
    for words in (("stat",), ("broker", "list"), ("group", "list"), ("top", "--once")):
        done = command(*words)
        assert (done.returncode, done.stderr) == (0, ""), words
    [broker] = json.loads(command("top", "--once", "--json").stdout)["brokers"]
    assert (broker["address"].partition(":")[0], broker["state"]) == (HOST, "ok")


@pytest.mark.parametrize(
    "words",
    [
        ("broker", "drain"),
        ("group", "show", "g"),
        ("group", "drop", "g", "--yes"),
        ("dlq", "list", "g"),
        ("tx", "list"),
        ("msg", "cancel", "0" * 32),
    ],
)
def test_messages_and_changes_are_not(command: Command, words: tuple[str, ...]) -> None:
    done = command(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert HOW_TO_CHANGE in done.stderr
    assert command("broker", "list").returncode == 0, "it serves"
