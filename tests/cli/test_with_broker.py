"""The command line with a real broker."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
import trio

from kiteq.message import Received
from kiteq_client import Client, Reject, direct
from kiteq_client import Message as ClientMessage
from tests.cli.running import environment, listening, refused, run
from tests.support.broker import BrokerProcess, free_port

pytestmark = pytest.mark.slow

ID = "00112233445566778899aabbccddeeff"


def test_a_message_goes_from_send_to_listen(broker: BrokerProcess) -> None:
    with listening(broker, "trade", "--count", "1") as listener:
        sent = run(broker, "send", "trade", "pay", "hello", "--property", "k=v", "--id", ID)
        assert sent == f"stored: id={ID} groups=1\n"
        printed, _ = listener.communicate(timeout=10)
        assert printed == f"trade pay {ID} k=v: hello\n"
        assert listener.returncode == 0
    assert run(broker, "group", "list") == "no group is bound\n"
    assert run(broker, "send", "trade", "pay", "hello", "--property", "k=v", "--id", ID).startswith("already accepted")


def test_a_message_nobody_is_bound_to_is_kept_and_the_receipt_says_so(broker: BrokerProcess) -> None:
    first, second = run(broker, "send", "trade", "pay").splitlines()
    assert re.fullmatch("stored: id=[0-9a-f]{32} groups=0", first)
    assert second == 'no group is bound to trade pay; it is kept for a group that binds with start="first"'
    assert run(broker, "send", "trade", "pay", "--fly").endswith("trade pay; the message is gone\n")


def test_a_body_with_characters_that_the_terminal_lacks_is_printed(broker: BrokerProcess) -> None:
    words = [sys.executable, "-m", "kiteq", "listen", "trade", "--count", "1"]
    with subprocess.Popen(
        words, env=environment(KITEQ_BROKER=broker.address, PYTHONIOENCODING="ascii"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as listener:  # fmt: skip
        assert listener.stdout is not None
        assert listener.stdout.readline().startswith("listening to ")
        run(broker, "send", "trade", "pay", "größe")
        printed, complaints = listener.communicate(timeout=10)
    assert printed.rstrip().endswith(": gr\\xf6\\xdfe")
    assert (listener.returncode, complaints) == (0, "")


def test_a_listener_whose_reader_goes_ends_quietly(broker: BrokerProcess) -> None:
    with listening(broker, "trade") as listener:
        assert listener.stdout is not None
        listener.stdout.close()
        run(broker, "send", "trade", "pay", "nobody reads this")
        listener.wait(10)
        assert listener.stderr is not None
        assert (listener.returncode, listener.stderr.read()) == (1, "")
        listener.stdout = None  # for `communicate`


def test_a_body_is_read_from_standard_input_byte_by_byte(broker: BrokerProcess) -> None:
    with listening(broker, "trade", "--regex", "p.*", "--json", "--count", "1") as listener:
        subprocess.run(
            [sys.executable, "-m", "kiteq", "send", "trade", "pay", "-", "--broker", broker.address],
            env=environment(),
            input=b"\xff\x00",
            check=True,
            capture_output=True,
        )
        message = json.loads(listener.communicate(timeout=10)[0])
    assert message["body"] == {"base64": "/wA="}
    assert (message["topic"], message["message_type"], message["attempt"]) == ("trade", "pay", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_listener_takes_its_group_along(broker: BrokerProcess, number: signal.Signals) -> None:
    with listening(broker, "trade") as listener:
        assert "fanout (temporary)" in run(broker, "group", "list")
        listener.send_signal(number)
        assert listener.wait(10) == 0
    assert run(broker, "group", "list") == "no group is bound\n"


def test_a_listener_with_a_group_leaves_it_bound(broker: BrokerProcess) -> None:
    with listening(broker, "trade", "pay", "--group", "members") as listener:
        listener.send_signal(signal.SIGINT)
        assert listener.wait(10) == 0
    run(broker, "send", "trade", "pay", "later")
    (row,) = json.loads(run(broker, "group", "list", "--json"))
    assert (row["group"], row["pending"], row["members"]) == ("members", 1, 0)
    shown = run(broker, "group", "show", "members")
    assert "direct pay" in shown
    assert shown.endswith("no connections\n")


def test_what_cannot_be_undone_is_asked_about(broker: BrokerProcess) -> None:
    with listening(broker, "trade", "pay", "--group", "members"):
        pass
    run(broker, "send", "trade", "pay")
    there = ("--broker", broker.address)
    sentence = refused(broker.folder, "group", "drop", "members", *there, status=2)
    assert sentence.startswith("dropping group members forgets 1 pending, 0 retrying and 0 dead messages in 1 topics:")
    sentence = refused(broker.folder, "group", "unsubscribe", "members", "trade", "pay", *there, status=2)
    assert "its last one, 1 messages are pending" in sentence
    sentence = refused(broker.folder, "group", "unsubscribe", "members", "trade", "--yes", *there, status=1)
    assert sentence == "group members has no fanout binding '*' to trade; it has direct pay"
    assert run(broker, "group", "drop", "members", "--yes") == "dropped group members: 1 pending, 0 retrying, 0 dead\n"
    assert run(broker, "group", "list") == "no group is bound\n"


def test_one_binding_is_removed(broker: BrokerProcess) -> None:
    for words in (("pay",), ("--regex", "re.*")):
        with listening(broker, "trade", *words, "--group", "members"):
            pass
    run(broker, "group", "unsubscribe", "members", "trade", "--regex", "re.*", "--yes")
    (row,) = json.loads(run(broker, "group", "list", "--json"))
    assert [(binding["kind"], binding["pattern"]) for binding in row["bindings"]] == [("direct", "pay")]


async def _reject_two(address: str) -> None:
    left = 2
    rejected = trio.Event()

    async def reject(message: Received) -> None:
        nonlocal left
        left -= 1
        if not left:
            rejected.set()
        raise Reject("never \x1b[2J")

    async with Client(
        f"kiteq://{address}", group="members", topics=["trade"], bindings=[direct("trade", "pay")], on_message=reject
    ) as client:
        await client.send_many([ClientMessage("trade", "pay", b"one", id=ID), ClientMessage("trade", "pay", b"two")])
        with trio.fail_after(10):
            await rejected.wait()


def test_dead_letters_are_listed_shown_replayed_and_purged(broker: BrokerProcess) -> None:
    trio.run(_reject_two, broker.address)
    listed = run(broker, "dlq", "list", "members")
    assert listed.count("\n") == 3
    assert "\x1b" not in listed
    shown = run(broker, "dlq", "show", "members", ID)
    assert shown.startswith(f"id           {ID}\n")
    assert shown.endswith("\n\none\n")
    assert json.loads(run(broker, "dlq", "show", "members", ID, "--json"))["body"] == {"text": "one"}
    assert run(broker, "dlq", "replay", "members", ID) == "given to group members again: 1\n"
    sentence = refused(broker.folder, "dlq", "purge", "members", "--broker", broker.address, status=2)
    assert sentence.startswith("purging deletes 1 dead letters of group members:")
    assert run(broker, "dlq", "purge", "members", "--yes") == "deleted dead letters of group members: 1\n"
    assert run(broker, "dlq", "list", "members") == "group members has no dead letters\n"


def test_what_the_broker_refuses_is_one_sentence(broker: BrokerProcess) -> None:
    there = ("--broker", broker.address)
    assert refused(broker.folder, "group", "show", "nope", *there, status=1).startswith("there is no group 'nope' here")
    assert refused(broker.folder, "listen", "trade", "--regex", "(", *there, status=1)


def test_counters_are_shown(broker: BrokerProcess) -> None:
    run(broker, "send", "trade", "pay")
    assert json.loads(run(broker, "stat", "--json"))["counters"]["accepted"] == 1
    assert "counters.accepted" in run(broker, "stat")


def test_the_broker_says_what_it_uses_and_how_to_try_it(broker: BrokerProcess) -> None:
    log = broker.log()
    assert f"serves on {broker.address}\n" in log
    assert str(broker.folder / "store") in log
    assert f"kiteq send trade greeting hello --broker {broker.address}" in log
    assert "every one of them is an administrator" in log


def test_a_port_in_use_is_one_sentence(broker: BrokerProcess, tmp_path: Path) -> None:
    sentence = refused(tmp_path, f"-bind={broker.address}", "-db=memory://", status=1)
    assert sentence == f"cannot listen on {broker.address}: another process listens there"


def test_an_address_that_the_machine_does_not_have_is_one_sentence(tmp_path: Path) -> None:
    sentence = refused(tmp_path, "-bind=203.0.113.77:0", "-insecure", "-db=memory://", status=1)
    assert sentence == (
        "cannot listen on 203.0.113.77:0: this machine has no such address; bind 0.0.0.0, and say with --advertise "
        "where other machines find it"
    )


def test_an_http_port_in_use_is_one_sentence(broker: BrokerProcess, tmp_path: Path) -> None:
    sentence = refused(tmp_path, "-bind=127.0.0.1:0", f"-pport={broker.port}", status=1)
    assert sentence == f"cannot listen on {broker.address}: another process listens there"
    assert not (tmp_path / "kiteq-data").exists()


def test_the_http_port_answers_until_the_broker_has_drained(tmp_path: Path) -> None:
    port = free_port()
    with BrokerProcess(tmp_path, f"-pport={port}") as broker:
        with urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
            assert json.load(answer) == {"status": "ok"}
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"\nkiteq_uptime_seconds " in answer.read()
        assert f"http://127.0.0.1:{port} has /stat, /binds, /healthz and /metrics\n" in broker.log()
        idle = socket.create_connection(("127.0.0.1", port), 10)
        assert broker.stop() == 0
        assert idle.recv(1) == b""
        idle.close()
    assert "Traceback" not in broker.log()
    assert "GET" not in broker.log()
    assert "hypercorn" not in broker.log()


def test_a_second_broker_on_the_folder_is_one_sentence(broker: BrokerProcess, tmp_path: Path) -> None:
    sentence = refused(tmp_path, "--bind", f"127.0.0.1:{free_port()}", "--db", broker.database, status=1)
    assert "another broker owns the store's folder" in sentence


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sentence = refused(tmp_path, "--bind", "127.0.0.1:0", "--db", "lmdb://./file/store", status=1)
    assert "file/store" in sentence


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_the_broker(broker: BrokerProcess, number: signal.Signals) -> None:
    run(broker, "send", "trade", "pay")
    assert broker.stop(number) == 0
    assert "stopping: clients may finish what they hold" in broker.log()


def test_a_second_signal_ends_the_broker_at_once(broker: BrokerProcess) -> None:
    async def hold() -> int:
        client = Client(f"kiteq://{broker.address}", group="slow", topics=["trade"], bindings=[direct("trade", "pay")])
        async with client:
            await client.send(ClientMessage("trade", "pay"))
            async for _delivery in client.deliveries():  # held, so that draining takes its whole time
                os.kill(broker.pid, signal.SIGTERM)
                with trio.fail_after(10):
                    while "stopping:" not in broker.log():  # noqa: ASYNC110 another process writes it
                        await trio.sleep(0.02)
                os.kill(broker.pid, signal.SIGTERM)
                return await trio.to_thread.run_sync(broker.wait, 5.0)
        raise AssertionError("no delivery came")

    assert trio.run(hold) == 128 + signal.SIGTERM
