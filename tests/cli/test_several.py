"""Administrative commands about several brokers at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import typer

from kiteq.cli.cluster import Cluster
from kiteq.message import Received
from kiteq_client import Client, Reject, direct
from kiteq_client import Message as ClientMessage
from tests.cli.running import kiteq, listening, refused, run
from tests.support.broker import BrokerProcess, free_port

pytestmark = pytest.mark.slow

ID = "00112233445566778899aabbccddeeff"
OTHER = "ffeeddccbbaa99887766554433221100"

Pair = tuple[BrokerProcess, BrokerProcess]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Two brokers that know nothing of each other."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    with (
        BrokerProcess(folders[0], database="memory://") as one,
        BrokerProcess(folders[1], database="memory://") as other,
    ):
        yield one, other


def both(pair: Pair) -> str:
    return f"kiteq://{pair[0].address},{pair[1].address}"


def run_both(pair: Pair, *words: str) -> str:
    """Run a command about both that must do its work; return what it prints."""
    done = kiteq(pair[0].folder, *words, KITEQ_BROKER=both(pair))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def rows_of(pair: Pair, *words: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(run_both(pair, *words, "--json"))
    return rows


def bind(pair: Pair, *words: str) -> None:
    for broker in pair:
        with listening(broker, "trade", *words, "--group", "members"):
            pass


def test_lists_and_figures_say_of_which_broker_they_are(pair: Pair) -> None:
    assert run_both(pair, "group", "list") == "no group is bound\n"
    bind(pair, "pay")
    run(pair[1], "send", "trade", "pay")
    titles, *lines = run_both(pair, "group", "list").splitlines()
    assert titles.startswith("BROKER ")
    assert sorted(line.split()[0] for line in lines) == sorted(broker.address for broker in pair)
    assert {row["broker"]: row["pending"] for row in rows_of(pair, "group", "list")} == {
        pair[0].address: 0,
        pair[1].address: 1,
    }
    shown = json.loads(run_both(pair, "group", "show", "members", "--json"))
    assert [row["broker"] for row in shown["topics"]] == [broker.address for broker in pair]
    assert run_both(pair, "group", "show", "members").endswith("\n\nno connections\n")
    assert {row["broker"] for row in rows_of(pair, "stat")} == {broker.address for broker in pair}
    assert re.search(rf"^{pair[1].address} +counters\.accepted +1$", run_both(pair, "stat"), re.MULTILINE)


def test_with_one_broker_nothing_names_it(broker: BrokerProcess) -> None:
    with listening(broker, "trade", "--group", "members"):
        pass
    for words in (("group", "list"), ("group", "show", "members"), ("stat",)):
        assert "broker" not in run(broker, *words, "--json").replace("broker_id", "")
        assert "BROKER" not in run(broker, *words)
    for named in (f"kiteq://{broker.address}", f"{broker.address},localhost:{broker.port}"):
        done = kiteq(broker.folder, "group", "list", "--json", KITEQ_BROKER=named)
        (row,) = json.loads(done.stdout)
        assert "broker" not in row


def test_one_broker_that_is_named_by_two_addresses_is_asked_once(broker: BrokerProcess) -> None:
    both_names = f"kiteq://{broker.address},localhost:{broker.port}"
    done = kiteq(broker.folder, "broker", "list", "--json", KITEQ_BROKER=both_names)
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(done.stdout)
    assert row["address"] == broker.address


def test_a_broker_that_is_not_reached_is_told_and_the_rest_shown(pair: Pair) -> None:
    bind(pair, "pay")
    pair[0].kill()
    done = kiteq(pair[0].folder, "group", "list", KITEQ_BROKER=both(pair))
    assert done.returncode == 1
    sentence = f"no broker answers at {pair[0].address}: connection refused; is one running there?"
    assert done.stderr == f"kiteq: {sentence}\n"
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["BROKER", pair[1].address]
    done = kiteq(pair[0].folder, "group", "drop", "members", "--yes", KITEQ_BROKER=both(pair))
    assert (done.returncode, done.stdout) == (1, "dropped group members: 0 pending, 0 retrying, 0 dead\n")
    pair[1].kill()
    done = kiteq(pair[0].folder, "group", "list", KITEQ_BROKER=both(pair))
    assert (done.returncode, done.stdout, done.stderr.count("no broker answers at")) == (1, "", 2)


def test_a_broker_that_dies_before_it_has_answered_is_told_and_the_others_answer(
    pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended, Cluster(both(pair)) as brokers:
        pair[1].kill()
        assert [told.broker for told in brokers.ask("stat")] == [pair[0].address]
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err.startswith(f"kiteq: the connection to {pair[1].address} broke: ")


def test_changes_of_a_group_are_made_at_every_broker(pair: Pair) -> None:
    bind(pair, "pay")
    bind(pair, "--regex", "re.*")
    for broker in pair:
        run(broker, "send", "trade", "pay")
    run(pair[1], "send", "trade", "pay")
    there = ("--broker", both(pair))
    sentence = refused(pair[0].folder, "group", "drop", "members", *there, status=2)
    assert sentence.startswith("dropping group members forgets 3 pending, 0 retrying and 0 dead messages in 1 topics:")
    run_both(pair, "group", "unsubscribe", "members", "trade", "--regex", "re.*", "--yes")
    assert [len(row["bindings"]) for row in rows_of(pair, "group", "list")] == [1, 1]  # type: ignore[arg-type]
    sentence = refused(pair[0].folder, "group", "unsubscribe", "members", "trade", "pay", *there, status=2)
    assert "its last one, 3 messages are pending" in sentence
    dropped = run_both(pair, "group", "drop", "members", "--yes")
    assert dropped == "dropped group members: 3 pending, 0 retrying, 0 dead\n"
    assert run_both(pair, "group", "list") == "no group is bound\n"
    for words in (("group", "show", "members"), ("group", "drop", "members", "--yes"), ("dlq", "list", "members")):
        assert refused(pair[0].folder, *words, *there, status=1).startswith("there is no group 'members' here")


def test_a_group_that_only_one_broker_knows_is_changed_there(pair: Pair) -> None:
    with listening(pair[1], "trade", "pay", "--group", "members"):
        pass
    assert [row["broker"] for row in rows_of(pair, "group", "list")] == [pair[1].address]
    run_both(pair, "group", "drop", "members", "--yes")
    assert run(pair[1], "group", "list") == "no group is bound\n"


async def reject(address: str, *ids: str) -> None:
    left = set(ids)
    rejected = trio.Event()

    async def handle(message: Received) -> None:
        left.discard(message.id.hex())
        if not left:
            rejected.set()
        raise Reject("never")

    async with Client(
        f"kiteq://{address}", group="members", topics=["trade"], bindings=[direct("trade", "pay")], on_message=handle
    ) as client:
        await client.send_many([ClientMessage("trade", "pay", id=one) for one in ids])
        with trio.fail_after(20):
            await rejected.wait()


def test_dead_letters_are_found_wherever_they_are(pair: Pair) -> None:
    trio.run(reject, pair[0].address, ID)
    trio.run(reject, pair[1].address, OTHER)
    assert {row["id"]: row["broker"] for row in rows_of(pair, "dlq", "list", "members")} == {
        ID: pair[0].address,
        OTHER: pair[1].address,
    }
    assert [row["id"] for row in rows_of(pair, "dlq", "list", "members", "--limit", "1")] == [ID]
    assert run_both(pair, "dlq", "list", "members").startswith("BROKER ")
    assert run_both(pair, "dlq", "show", "members", OTHER).startswith(f"broker       {pair[1].address}\nid  ")
    assert json.loads(run_both(pair, "dlq", "show", "members", ID, "--json"))["broker"] == pair[0].address
    there = ("--broker", both(pair))
    unknown = "aa" * 16
    for words in (("show",), ("replay",), ("purge", "--yes")):
        sentence = refused(pair[0].folder, "dlq", words[0], "members", unknown, *words[1:], *there, status=1)
        assert sentence.startswith(f"group 'members' has no dead letter '{unknown}'")
    assert run_both(pair, "dlq", "replay", "members", OTHER) == "given to group members again: 1\n"
    assert [row["id"] for row in rows_of(pair, "dlq", "list", "members")] == [ID]
    trio.run(reject, pair[1].address, "bb" * 16)
    sentence = refused(pair[0].folder, "dlq", "purge", "members", *there, status=2)
    assert re.match("purging deletes [23] dead letters of group members:", sentence)
    assert run_both(pair, "dlq", "purge", "members", ID, "--yes") == "deleted dead letters of group members: 1\n"


async def prepare(address: str, message_id: str) -> None:
    async with Client(f"kiteq://{address}", group="orders", topics=["trade"]) as client:
        await client.prepare(ClientMessage("trade", "pay", id=message_id))


def test_transactions_are_found_wherever_they_are(pair: Pair) -> None:
    trio.run(prepare, pair[1].address, ID)
    trio.run(prepare, pair[0].address, OTHER)
    assert [(row["broker"], row["id"]) for row in rows_of(pair, "tx", "list")] == [
        (pair[1].address, ID),
        (pair[0].address, OTHER),
    ]
    assert len(rows_of(pair, "tx", "list", "--limit", "1")) == 1
    assert run_both(pair, "tx", "show", ID).startswith(f"broker        {pair[1].address}\nid  ")
    assert run_both(pair, "tx", "resume", ID) == f"nothing changed, {ID} is not parked\n"
    assert run_both(pair, "tx", "commit", ID, "--reason", "paid") == f"committed: {ID}\n"
    assert run_both(pair, "tx", "rollback", OTHER, "--reason", "not paid") == f"rolled back: {OTHER}\n"
    assert [(row["broker"], row["id"]) for row in rows_of(pair, "tx", "audit")] == [
        (pair[0].address, OTHER),
        (pair[1].address, ID),
    ]
    decided = rows_of(pair, "tx", "list", "--state", "decided")
    assert [row["id"] for row in decided] == [OTHER, ID]
    there = ("--broker", both(pair))
    sentence = refused(pair[0].folder, "tx", "commit", "aa" * 16, "--reason", "x", *there, status=1)
    assert sentence.startswith("no transaction aaaa")
    counters = [row["counters"] for row in rows_of(pair, "stat")]
    assert not any("unknown_transactions" in told for told in counters)  # type: ignore[operator]


def test_a_delayed_message_is_cancelled_wherever_it_waits(pair: Pair) -> None:
    run(pair[1], "send", "trade", "pay", "--delay", "1h", "--id", ID)
    assert run_both(pair, "msg", "cancel", ID) == "cancelled: 1\n"
    sentence = refused(pair[0].folder, "msg", "cancel", ID, "--broker", both(pair), status=1)
    assert sentence.startswith(f"no message {ID} waits for its time")


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("h:1,here", "--broker is 'h:1,here'; it must be HOST:PORT"),
        ("a..b:1", "--broker is 'a..b:1'; it must be HOST:PORT, where HOST is a name"),
        ("kiteq://h:1,", "--broker is 'kiteq://h:1,'; it must be HOST:PORT"),
        ("zk://", "--broker: 'zk://': '' is not host:port"),
        ("zk://me:secret@h", "--broker: a registry URL holds no user and no password"),
    ],
)
def test_a_wrong_list_is_one_sentence(tmp_path: Path, named: str, sentence: str) -> None:
    told = refused(tmp_path, "stat", "--broker", named, status=2)
    assert told.startswith(sentence)
    assert "secret" not in told


def test_a_registry_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    url = f"zk://127.0.0.1:{free_port()}"
    sentence = refused(tmp_path, "stat", "--broker", url, status=1)
    assert sentence.startswith(f"the registry {url} cannot be read: ")


def test_credentials_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    sentence = refused(tmp_path, "stat", "--broker", "zk://127.0.0.1", status=2, KITEQ_ZK_AUTH="nobody")
    assert sentence.startswith("KITEQ_ZK_AUTH: it must be user:password")
