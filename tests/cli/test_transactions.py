"""Transactions and delayed messages on the command line, with a real broker."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import trio

from kiteq.message import Received
from kiteq_client import Client, Decision
from kiteq_client import Message as ClientMessage
from tests.cli.running import listening, refused, run
from tests.support.broker import BrokerProcess

pytestmark = pytest.mark.slow

ID = "00112233445566778899aabbccddeeff"
OTHER = "ffeeddccbbaa99887766554433221100"


async def _prepare(address: str, *messages: ClientMessage) -> None:
    async with Client(f"kiteq://{address}", group="orders", topics=["trade"]) as client:
        for message in messages:
            await client.prepare(message)


def test_transactions_are_listed_shown_and_decided(broker: BrokerProcess) -> None:
    assert run(broker, "tx", "list") == "no transaction is open or parked, as far as asked for\n"
    with listening(broker, "trade", "pay", "--group", "members"):
        pass
    one = ClientMessage("trade", "pay", b"one", id=ID, properties={"k": "v\x1b"})
    trio.run(_prepare, broker.address, one, ClientMessage("trade", "pay", b"two", id=OTHER))
    titles, first, second = run(broker, "tx", "list").splitlines()
    assert titles.split()[:6] == ["ID", "STATE", "GROUP", "TOPICS", "MESSAGES", "AGE"]
    assert re.fullmatch(rf"{ID}  open   orders  trade          1  \d+s +0        0  .*", first)
    assert second.startswith(OTHER)
    assert run(broker, "tx", "list", "--state", "parked").startswith("no transaction is parked")
    assert run(broker, "tx", "list", "--older-than", "2h").startswith("no transaction is open")
    rows = json.loads(run(broker, "tx", "list", "--group", "orders", "--topic", "trade", "--limit", "1", "--json"))
    assert [row["id"] for row in rows] == [ID]
    shown = run(broker, "tx", "show", ID.upper())
    assert f"id            {ID}\nstate         open\ngroup         orders\nprepared      20" in shown
    assert "first message trade pay, " in shown
    assert "property      k=v\\x1b\n" in shown
    assert shown.endswith("\n\nit was not asked about\n")
    assert run(broker, "tx", "commit", ID, "--reason", "paid\x1b, see ticket 7") == f"committed: {ID}\n"
    assert run(broker, "tx", "rollback", OTHER, "--reason", "never paid") == f"rolled back: {OTHER}\n"
    again = run(broker, "tx", "commit", ID, "--reason", "again")
    assert again == f"nothing changed, {ID} was decided before: committed\n"
    latest, earlier = run(broker, "tx", "audit").splitlines()[1:]
    assert re.fullmatch(rf"20.{{19}}rollback  {OTHER}  orders  127\.0\.0\.1:\S+  never paid", latest)
    assert earlier.endswith("paid\\x1b, see ticket 7")
    assert json.loads(run(broker, "tx", "audit", "--limit", "1", "--json"))[0]["verb"] == "rollback"
    decided = run(broker, "tx", "list", "--state", "decided").splitlines()[1:]
    assert [re.split(" {2,}", line)[:2] for line in decided] == [[OTHER, "rolled back"], [ID, "committed"]]
    shown = run(broker, "tx", "show", ID)
    assert "decision      committed, by 127.0.0.1:" in shown
    assert "reason        paid\\x1b, see ticket 7\n" in shown
    (row,) = json.loads(run(broker, "group", "list", "--json"))
    assert row["pending"] == 1


def test_what_cannot_be_decided_is_one_sentence(broker: BrokerProcess) -> None:
    there = ("--broker", broker.address)
    for verb in (("show",), ("resume",), ("commit", "--reason", "x"), ("rollback", "--reason", "x")):
        assert ID in refused(broker.folder, "tx", verb[0], ID, *verb[1:], *there, status=1)
    trio.run(_prepare, broker.address, ClientMessage("trade", "pay", id=ID))
    assert run(broker, "tx", "resume", ID) == f"nothing changed, {ID} is not parked\n"
    run(broker, "tx", "commit", ID, "--reason", "x")
    sentence = refused(broker.folder, "tx", "rollback", ID, "--reason", "x", *there, status=1)
    assert sentence.startswith(f"transaction {ID} was committed by 127.0.0.1:")
    sentence = refused(broker.folder, "tx", "list", "--state", "decided", "--topic", "trade", *there, status=1)
    assert sentence.startswith("the topics of decided transactions are not kept")


async def _answer_unknown(broker: BrokerProcess) -> None:
    """Stay until the broker has parked what was asked about."""

    async def unknown(message: Received) -> Decision:
        return Decision.UNKNOWN

    async with Client(f"kiteq://{broker.address}", group="orders", topics=["trade"], on_check=unknown) as client:
        await client.prepare(ClientMessage("trade", "pay", id=ID))
        with trio.fail_after(20):
            while "a transaction is parked" not in broker.log():  # noqa: ASYNC110 another process writes it
                await trio.sleep(0.02)


def test_a_parked_transaction_shows_its_checks_and_is_resumed(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path, "--check-after=100ms", "--check-limit=1") as broker:
        trio.run(_answer_unknown, broker)
        assert ID in run(broker, "tx", "list", "--state", "parked")
        shown = run(broker, "tx", "show", ID)
        assert "state         parked\n" in shown
        assert "asked         1 times, 1 times answered with unknown\n" in shown
        titles, check = shown.split("\n\n")[1].splitlines()
        assert re.split(" {2,}", titles) == ["CHECK (UTC)", "ASKED", "ANSWER", "ANSWERED (UTC)"]
        assert re.split(" {2,}", check)[2] == "unknown"
        assert run(broker, "tx", "resume", ID) == f"{ID} will be asked about again\n"
        assert run(broker, "tx", "list", "--state", "parked").startswith("no transaction is parked")


def test_a_delayed_message_is_cancelled(broker: BrokerProcess) -> None:
    run(broker, "send", "trade", "pay", "later", "--delay", "1h", "--id", ID)
    assert run(broker, "msg", "cancel", ID, "--group", "kiteq-cli") == "cancelled: 1\n"
    sentence = refused(broker.folder, "msg", "cancel", ID, "--broker", broker.address, status=1)
    assert sentence.startswith(f"no message {ID} waits for its time")
