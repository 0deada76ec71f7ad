"""Clients and brokers of other releases: they agree on a wire version, or a sentence says which one to upgrade."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from kiteq.errors import NotConnected, Refused
from kiteq.remoting.packets import WIRE_VERSIONS, Welcome
from kiteq_client import Client, Message, Received, direct
from tests.cli.running import kiteq
from tests.client.peer import Connection, both_loops, peer
from tests.protocol.raw_client import HELLO, PING, PONG, WELCOME, RawClient, RefusedError
from tests.protocol.raw_client import Message as RawMessage
from tests.support.broker import BrokerProcess
from tests.versions.speaking import broker_speaking
from tests.workers.parts import WorkerSet

pytestmark = pytest.mark.slow

OURS = ", ".join(map(str, WIRE_VERSIONS))
LATER = WIRE_VERSIONS[-1] + 1
BROKERS: Final = 10
"""The packet, by its number in doc/protocol.md."""
PAID = ["trade", 0, "pay-succ", None, True, "latest"]
"""A binding, as it travels."""


@pytest.fixture(scope="module")
def present(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    with BrokerProcess(tmp_path_factory.mktemp("present")) as broker:
        yield broker


# --- clients of other releases at the present broker ----------------------------------------------


@pytest.mark.parametrize(
    ("offered", "agreed"),
    [((1,), 1), ((1, 2), 2), ((2, 1), 2), ((2,), 2), ((1, 99), 1), ((2, LATER, 99), 2), ((1, 1), 1)],
)
def test_the_newest_version_that_both_speak_is_taken(
    present: BrokerProcess, offered: tuple[int, ...], agreed: int
) -> None:
    with RawClient(present.host, present.port) as client:
        version, *_ = client.ask(HELLO, "kiteq", offered, bytes(16), "members", ["trade"], [PAID], 0, 1, answer=WELCOME)
        assert version == agreed
        client.grant(1)
        sent = RawMessage("trade", "pay-succ", b"echo").encode()
        client.publish(sent)
        delivery = client.receive()
        assert delivery.data == sent
        assert client.ack(delivery.tag) == []


@pytest.mark.parametrize(
    ("offered", "said", "older"),
    [((), "none", "client"), ((0,), "0", "client"), ((LATER,), str(LATER), "broker"), ((98, 99), "98, 99", "broker")],
)
def test_a_client_without_a_common_version_is_told_which_side_to_upgrade(
    present: BrokerProcess, offered: tuple[int, ...], said: str, older: str
) -> None:
    with RawClient(present.host, present.port) as client, pytest.raises(RefusedError) as refused:
        client.greet("members", "trade", "pay-succ", versions=offered)
    code, reason, temporary = refused.value.args
    assert (code, temporary) == ("protocol_version", False)
    assert reason == f"this broker speaks wire versions {OURS}, the client {said}: upgrade the {older}"


class Watching(RawClient):
    """Notes the type of each packet that arrives."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.types: list[int] = []

    def _next_packet(self) -> list[Any]:
        packet = super()._next_packet()
        self.types.append(packet[0])
        return packet


def test_only_a_client_of_version_2_is_told_of_the_other_workers(tmp_path: Path) -> None:
    with WorkerSet(tmp_path, 2) as workers:
        for offered, expected in (((1,), [WELCOME, PONG]), ((1, 2), [WELCOME, BROKERS, PONG])):
            with Watching(workers.host, workers.port) as client:
                client.greet("members", "trade", "pay-succ", versions=offered)
                client.ask(PING, answer=PONG)  # answered behind whatever followed the greeting
                assert client.types == expected


# --- the present client at brokers of other releases ----------------------------------------------


async def test_the_present_client_works_with_a_broker_that_speaks_only_version_1(tmp_path: Path) -> None:
    got = trio.Event()

    async def handle(message: Received) -> None:
        assert message.text == "committed"
        got.set()

    async with broker_speaking(tmp_path, 1) as broker:
        bindings = [direct("trade", "pay-succ")]
        async with Client(
            f"kiteq://{broker.address}", group="g", topics=["trade"], bindings=bindings, on_message=handle
        ) as client:
            async with client.transaction(Message("trade", "pay-succ", "committed")):
                pass
            with trio.fail_after(10):
                await got.wait()


async def test_the_present_client_is_refused_by_a_broker_that_speaks_only_a_later_version(tmp_path: Path) -> None:
    async with broker_speaking(tmp_path, LATER) as broker:
        with pytest.raises(Refused) as refused:
            async with Client(f"kiteq://{broker.address}", group="g"):
                raise AssertionError
    assert refused.value.code == "protocol_version"
    assert refused.value.reason == (f"this broker speaks wire versions {LATER}, the client {OURS}: upgrade the client")


async def test_a_gap_between_the_versions_of_a_broker_is_no_agreement(tmp_path: Path) -> None:
    async with broker_speaking(tmp_path, 0, LATER) as broker:
        with pytest.raises(Refused, match="upgrade the client"):
            async with Client(f"kiteq://{broker.address}", group="g"):
                raise AssertionError


@pytest.mark.parametrize("words", [("stat",), ("send", "trade", "pay-succ", "x"), ("listen", "trade")])
def test_a_command_says_in_one_sentence_that_it_is_too_old(tmp_path: Path, words: tuple[str, ...]) -> None:
    with broker_speaking(tmp_path, LATER) as broker:
        done = kiteq(tmp_path, *words, "--broker", broker.address)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"this broker speaks wire versions {LATER}, the client {OURS}: upgrade the client" in done.stderr


@both_loops
async def test_a_broker_that_chooses_what_was_not_offered_is_at_fault() -> None:
    async def script(connection: Connection) -> None:
        hello = await connection.receive()
        await connection.send(Welcome(hello.request, 99, "b1", {}, admin=False))
        await connection.serve()

    async with peer(script) as address:
        with pytest.raises(NotConnected, match="wire version 99, which was not offered"):
            async with Client(address, group="g", timeout=1):
                raise AssertionError
