"""`kiteq broker`: which brokers there are, and that one should end."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import trio

from kiteq.cli.session import AdminSession
from kiteq.errors import Refused
from kiteq_client import Client, Message, direct, fanout
from tests.cli.running import environment, kiteq, refused, run
from tests.e2e.wire import numbered
from tests.support.broker import BrokerProcess, free_port
from tests.workers.parts import PATIENCE_SECONDS, WorkerSet, connect

pytestmark = pytest.mark.slow


def test_brokers_are_listed_with_what_they_are(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path, "--topics=trade,feed", database="memory://") as broker:
        gone = f"127.0.0.1:{free_port()}"
        titles, line = run(broker, "broker", "list").splitlines()
        assert re.split(" {2,}", titles) == ["ADDRESS", "BROKER ID", "STATE", "EPOCH", "WIRE", "TOPICS"]
        address, broker_id, *rest = re.split(" {2,}", re.sub(r"(\S) +(\d+) +(\d+)  ", r"\1  \2  \3  ", line))
        assert (address, rest) == (broker.address, ["ok", "1", "2", "trade, feed"])
        done = kiteq(tmp_path, "broker", "list", "--json", "--broker", f"{broker.address},{gone}")
        assert done.returncode == 1
        rows = {row["address"]: row for row in json.loads(done.stdout)}
        row = rows[broker.address]
        assert (row["broker_id"], row["state"], row["pid"]) == (broker_id, "ok", broker.pid)
        assert (rows[gone]["state"], rows[gone]["broker_id"]) == ("not reached", None)
        assert rows[gone].keys() == row.keys()
        assert done.stderr == f"kiteq: {rows[gone]['reasons'][0]}\n"


def test_no_broker_there_is_one_sentence(tmp_path: Path) -> None:
    for words in (("broker", "list"), ("broker", "drain"), ("top",), ("top", "--once")):
        address = f"127.0.0.1:{free_port()}"
        sentence = refused(tmp_path, *words, "--broker", address, status=1)
        assert sentence == f"no broker answers at {address}: connection refused; is one running there?"


def test_a_broker_of_another_version_that_does_not_know_a_command_is_named(broker: BrokerProcess) -> None:
    with AdminSession(broker.address) as session, pytest.raises(Refused) as raised:
        session.ask("broker.polish")
    assert raised.value.code == "unknown_verb"
    assert raised.value.reason == (
        f"the broker at {broker.address} is of another version and does not know 'broker.polish': upgrade the older one"
    )


def test_draining_ends_the_broker_and_waits_until_the_store_is_free(broker: BrokerProcess) -> None:
    told = run(broker, "broker", "drain", "--wait")
    assert told == (
        f"draining {broker.address}: clients may finish what they hold, at most 10s\ngone: {broker.address}\n"
    )
    broker.start()  # its store is locked no more, and its port is free
    assert json.loads(run(broker, "stat", "--json"))["epoch"] == 2
    assert broker.log().count("draining: an administrator asked for it") == 1


SLOW_END = """
import atexit, time
from kiteq.pipe.events import Routed
atexit.register(time.sleep, 1)
class Handler:
    accepts, emits, before = (Routed,), (Routed,), "persist"
    def __init__(self, core): ...
    def handle(self, event): return (event,)
"""


def test_draining_waits_for_the_end_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "slow_end.py").write_text(SLOW_END)
    with BrokerProcess(tmp_path, "--handlers", "slow_end:Handler", database="memory://") as broker:
        run(broker, "broker", "drain", "--wait")
        assert not broker.is_running


def test_draining_waits_for_clients_and_is_answered_at_once(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path, "--drain-timeout=60s", database="memory://") as broker:

        async def hold() -> None:
            url = f"kiteq://{broker.address}"
            async with Client(url, group="slow", topics=["trade"], bindings=[direct("trade", "pay")]) as client:
                await client.send(Message("trade", "pay"))
                async for delivery in client.deliveries():
                    with AdminSession(broker.address) as session, AdminSession(broker.address) as waiting:
                        assert session.ask("broker.drain")["draining_before"] is False
                        gone = threading.Thread(target=waiting.wait_gone)
                        gone.start()
                        assert session.ask("broker.show")["state"] == "draining"
                        assert session.ask("broker.drain")["draining_before"] is True
                        assert gone.is_alive()
                        await delivery.ack()
                        await trio.to_thread.run_sync(gone.join, 20)
                        assert not gone.is_alive()
                    break

        trio.run(hold)
        assert broker.wait() == 0


def test_only_one_broker_is_drained_at_a_time(broker: BrokerProcess) -> None:
    gone = f"127.0.0.1:{free_port()}"
    done = kiteq(broker.folder, "broker", "drain", "--broker", f"kiteq://{broker.address},{gone}")
    assert done.returncode == 1
    assert "draining is done to one broker: name it with --broker HOST:PORT; there are" in done.stderr
    assert broker.is_running


def test_a_set_of_workers_is_known_from_each_of_them_and_drained_together(tmp_path: Path) -> None:
    with WorkerSet(tmp_path, 2, database="memory://") as workers:
        addresses = workers.addresses
        for named in addresses:
            rows = json.loads(kiteq(tmp_path, "broker", "list", "--json", "--broker", named).stdout)
            assert [row["address"] for row in rows] == addresses
        told = kiteq(tmp_path, "broker", "drain", "--wait", "--broker", addresses[1])
        assert (told.returncode, told.stderr) == (0, "")
        assert told.stdout.endswith(f"gone: the workers {addresses[1]}, {addresses[0]}\n")
        assert workers.wait() == 0


def test_waiting_for_workers_to_end_is_given_up_at_once(tmp_path: Path) -> None:
    async def give_up(workers: WorkerSet) -> None:
        member = await connect(workers.addresses[0], "slow", fanout("trade"), window=1)
        await member.publish(numbered(1, "trade"))
        await member.take(1)  # and it is never acked
        process = subprocess.Popen(  # noqa: ASYNC220 the rest of the test waits in threads
            [sys.executable, "-m", "kiteq", "broker", "drain", "--wait", "--broker", workers.addresses[0]],
            env=environment(),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        with process, member.stream.socket:
            assert (await trio.to_thread.run_sync(process.stdout.readline)).startswith(b"draining the workers ")
            process.send_signal(signal.SIGINT)
            try:
                assert await trio.to_thread.run_sync(partial(process.wait, PATIENCE_SECONDS)) == 130
            finally:
                process.kill()
            assert workers.is_running

    with WorkerSet(tmp_path, 2, "--drain-timeout=120s", database="memory://") as workers:
        trio.run(give_up, workers)
