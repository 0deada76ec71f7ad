"""Commands about brokers that are found through ZooKeeper."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import kiteq, listening, refused, run
from tests.cli.test_top import watching
from tests.support.broker import BrokerProcess
from tests.support.zookeeper import ZooKeeperProcess

pytestmark = pytest.mark.slow

USER = {"kiteq": "secret"}


@pytest.fixture(scope="module")
def zookeeper() -> Iterator[ZooKeeperProcess]:
    with ZooKeeperProcess(users=USER) as process:
        yield process


@pytest.fixture
def url(zookeeper: ZooKeeperProcess) -> str:
    return f"zk://{zookeeper.address}/test-{uuid.uuid4().hex[:12]}"


def found(folder: Path, url: str, *words: str) -> str:
    """Run a command about the brokers that the registry knows; it must do its work."""
    done = kiteq(folder, *words, KITEQ_BROKER=url)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_brokers_are_found_as_they_come_die_and_leave(tmp_path: Path, url: str) -> None:
    for words in (("broker", "list"), ("stat",), ("top",)):
        sentence = refused(tmp_path, *words, "--broker", url, status=1)
        assert sentence == f"no broker is announced in {url}; was one started with this --zkhost?"
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    # Longer than the test: what a broker that died has announced stays.
    there = (f"--zkhost={url}", "--zk-timeout=60s")
    with BrokerProcess(folders[0], *there, "--topics=trade,feed", database="memory://") as one:
        (row,) = json.loads(found(tmp_path, url, "broker", "list", "--json"))
        assert (row["address"], row["announced"], row["topics"]) == (one.address, True, ["trade", "feed"])
        with listening(one, "trade", "pay", "--group", "members"):
            pass
        assert "BROKER" not in found(tmp_path, url, "group", "list")
        with watching(url) as samples, BrokerProcess(folders[1], *there) as other:
            samples.until_states("ok", "ok")
            for broker in (one, other):
                run(broker, "send", "trade", "pay")
            rows = json.loads(found(tmp_path, url, "group", "list", "--json"))
            assert {row["broker"]: row["pending"] for row in rows} == {one.address: 1, other.address: 1}
            dropped = found(tmp_path, url, "group", "drop", "members", "--yes")
            assert dropped == "dropped group members: 2 pending, 0 retrying, 0 dead\n"
            sentence = refused(tmp_path, "broker", "drain", "--broker", url, status=1)
            assert sentence.startswith("draining is done to one broker: name it with --broker HOST:PORT; there are ")
            other.kill()
            samples.until_states("ok", "not reached")
            done = kiteq(tmp_path, "broker", "list", "--json", "--broker", url)
            assert done.returncode == 1
            lost = {row["address"]: row for row in json.loads(done.stdout)}[other.address]
            other.start()
            samples.until_states("ok", "ok")
            with listening(one, "trade", "--count", "2", "--broker", url) as listener:
                for named in (url, other.address):
                    found(tmp_path, named, "send", "trade", "pay", "hello")
                printed, _ = listener.communicate(timeout=20)
                assert (printed.count(": hello\n"), listener.returncode) == (2, 0)
            assert found(tmp_path, url, "group", "list") == "no group is bound\n"
            other.kill()
            assert (lost["state"], lost["epoch"], lost["topics"], lost["pid"]) == ("not reached", 1, ["*"], None)
        assert one.stop() == 0
    rows = json.loads(kiteq(tmp_path, "broker", "list", "--json", "--broker", url).stdout)
    assert [row["address"] for row in rows] == [other.address]


def test_a_command_logs_in_with_the_credentials_of_the_environment(tmp_path: Path, url: str) -> None:
    words = ("stat", "--broker", url)
    assert "no broker is announced" in refused(tmp_path, *words, status=1, KITEQ_ZK_AUTH="kiteq:secret")
    sentence = refused(tmp_path, *words, status=1, KITEQ_ZK_AUTH="kiteq:wrong")
    assert "does not accept the user and password of KITEQ_ZK_AUTH" in sentence
    assert "wrong" not in sentence


def test_a_copy_of_a_store_that_runs_at_another_address_is_named(tmp_path: Path, url: str) -> None:
    original, copy = (BrokerProcess(tmp_path / name, f"--zkhost={url}") for name in ("original", "copy"))
    (tmp_path / "original").mkdir()
    with original:
        original.stop()
        shutil.copytree(original.folder, copy.folder)
        original.start()
        with copy:
            done = kiteq(tmp_path, "broker", "list", "--json", KITEQ_BROKER=url)
            (row,) = json.loads(done.stdout)
            (other,) = {original.address, copy.address} - {row["address"]}
            assert done.returncode == 1
            assert done.stderr == (
                f"kiteq: {other} is left out: it is broker {row['broker_id']} as {row['address']} is; "
                "does another process run on a copy of its store?\n"
            )
