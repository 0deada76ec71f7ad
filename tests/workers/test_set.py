"""`kiteq --workers N` as a user meets it: processes that are killed, stopped and asked."""

from __future__ import annotations

import os
import signal
import socket
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import direct, fanout
from kiteq.message import Message
from kiteq.remoting import packets
from tests.cli.running import kiteq, refused
from tests.e2e.wire import RawClient, Refused
from tests.support.broker import BrokerProcess
from tests.workers.parts import PATIENCE_SECONDS, WorkerSet, all_gone, connect, free_ports, open_raw, running, until

pytestmark = pytest.mark.slow


def hello(number: int = 0) -> Message:
    return Message("trade", "hello", b"%010d" % number)


async def in_thread(function: object, *arguments: object) -> None:
    assert callable(function)
    await trio.to_thread.run_sync(partial(function, *arguments))


async def groups_of_next(client: RawClient) -> int:
    """Send a message and return to how many groups it went."""
    groups = (await client.publish([hello()])).groups
    assert isinstance(groups, int)
    return groups


async def wait_groups(client: RawClient, expected: int) -> None:
    """Send messages until one goes to so many groups."""
    with trio.fail_after(PATIENCE_SECONDS):
        while await groups_of_next(client) != expected:  # noqa: ASYNC110 another process makes it so
            await trio.sleep(0.02)


async def test_a_client_of_one_worker_is_told_of_all_of_them(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 3)) as workers:
        for address in workers.addresses:
            client = await connect(address, "told")
            assert (await client.wait(packets.Brokers)).addresses == workers.addresses
            await client.goodbye()


async def test_a_client_of_wire_version_1_is_told_nothing_it_cannot_read(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 2)) as workers:
        client = await connect(workers.address, "old", versions=(1,))
        await client.ask(packets.Ping, packets.Pong)
        assert client.received == []
        await client.goodbye()


async def test_the_set_introduces_itself_once_and_its_http_ports_count_up(tmp_path: Path) -> None:
    http = free_ports(2)
    async with running(WorkerSet(tmp_path, 2, "--pport", str(http), "--advertise", "here.example:700")) as workers:
        log = workers.log()
        assert log.count("serves on") == 1
        assert f"serves on {workers.address_of(0)} and {workers.address_of(1)}\n" in log
        assert "the same for the others in worker-1 in it" in log
        assert "  advertise here.example:700 and here.example:701\n" in log
        assert f"  http      http://127.0.0.1:{http} and 127.0.0.1:{http + 1} has" in log
        for port in (http, http + 1):
            answer = await trio.to_thread.run_sync(urllib.request.urlopen, f"http://127.0.0.1:{port}/healthz")
            with answer:
                assert answer.status == 200
        client = await connect(workers.address, "told")
        assert (await client.wait(packets.Brokers)).addresses == ["here.example:700", "here.example:701"]


async def test_bound_to_every_address_clients_are_told_the_ports(tmp_path: Path) -> None:
    port = free_ports(2)
    workers = WorkerSet(tmp_path, 2, "--bind", f"0.0.0.0:{port}", "--insecure")
    workers.port = port
    async with running(workers):
        client = await connect(workers.address, "told")
        assert (await client.wait(packets.Brokers)).addresses == [f":{workers.port}", f":{workers.port + 1}"]


async def test_a_killed_worker_comes_back_with_its_messages(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 3)) as workers:
        group = direct("trade", "hello")
        client = await connect(workers.address_of(1), "g", group)
        receipts = await client.publish([hello(number) for number in range(10)])
        assert (receipts.groups, receipts.durable) == (1, True)
        await in_thread(workers.kill_worker, 1)
        await in_thread(workers.wait_back, 1)
        client = await connect(workers.address_of(1), "g", group, window=100)
        assert (await client.wait(packets.Brokers)).addresses == workers.addresses
        deliveries = await client.take(10)
        assert [one.number for one in deliveries] == list(range(10))
        assert await client.ack(deliveries) == []
        assert "SIGKILL" in workers.log()


async def test_a_worker_that_dies_again_and_again_waits_longer_each_time(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 2)) as workers:
        for wait in ("0.0", "0.5", "1.0"):
            await in_thread(workers.wait_back, 1)
            await in_thread(workers.kill_worker, 1)
            told = f'"wait_seconds": {wait}'
            await in_thread(until, lambda told=told: told in workers.log(), f"{told} in the log")
        await in_thread(workers.wait_back, 1)


async def test_a_worker_that_is_ended_alone_is_started_again(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 2)) as workers:
        process = workers.worker(1)
        assert process is not None
        process.terminate()
        told = "a worker has ended and is started again"
        await in_thread(until, lambda: told in workers.log(), "the end of a worker in the log")
        await in_thread(workers.wait_back, 1)


async def test_when_the_process_that_runs_them_is_killed_the_workers_drain_and_end(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 3)) as workers:
        client = await connect(workers.address_of(2), "g", fanout("trade"))
        pids = workers.pids()
        assert len(pids) == 3
        await in_thread(workers.kill)
        assert "shutting down" in (await client.wait(packets.Goodbye)).reason
        await client.goodbye()
        await in_thread(until, lambda: all_gone(pids), "the end of the workers")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_every_worker(tmp_path: Path, number: signal.Signals) -> None:
    async with running(WorkerSet(tmp_path, 3)) as workers:
        clients = [await connect(address, "g", fanout("trade"), window=1) for address in workers.addresses]
        for client in clients:
            assert await groups_of_next(client) == 1
        held = [await client.take(1) for client in clients]
        pids = workers.pids()
        os.kill(workers.pid, number)
        for client, deliveries in zip(clients, held, strict=True):
            await client.wait(packets.Goodbye)
            assert await client.ack(deliveries) == []
            await client.goodbye()
        assert await trio.to_thread.run_sync(workers.wait) == 0
        assert all_gone(pids)
        assert "started again" not in workers.log()


async def test_a_second_signal_ends_every_worker_at_once(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 2, "--drain-timeout", "600s")) as workers:
        client = await connect(workers.address_of(1), "g", fanout("trade"), window=1)
        await groups_of_next(client)
        await client.take(1)
        pids = workers.pids()
        os.kill(workers.pid, signal.SIGTERM)
        await client.wait(packets.Goodbye)
        os.kill(workers.pid, signal.SIGTERM)
        assert await trio.to_thread.run_sync(workers.wait) == 128 + signal.SIGTERM
        await in_thread(until, lambda: all_gone(pids), "the end of the workers")


async def test_the_terminal_reaches_only_the_process_that_runs_the_workers(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 2)) as workers:
        groups = {os.getpgid(pid) for pid in workers.pids()}
        assert os.getpgid(workers.pid) not in groups


async def test_to_drain_one_worker_drains_all_of_them(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 2)) as workers:
        client = await connect(workers.address_of(1), "g")
        await client.admin("broker.drain")
        assert await trio.to_thread.run_sync(workers.wait) == 0


async def test_what_is_bound_at_one_worker_is_bound_at_all(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 3)) as workers:
        await (await connect(workers.address_of(0), "g", fanout("trade"))).goodbye()
        for address in workers.addresses:
            await wait_groups(await connect(address, "producers"), 1)
        client = await open_raw(workers.address_of(1))
        with pytest.raises(Refused, match="binding_conflict"):
            await client.hello("g", [direct("trade", "hello", watermark=5)])


async def test_a_worker_learns_what_was_bound_and_dropped_while_it_was_down(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 2)) as workers:
        await (await connect(workers.address_of(1), "old", fanout("trade"))).goodbye()
        elsewhere = await connect(workers.address_of(0), "producers")
        await wait_groups(elsewhere, 1)
        for _ in range(3):  # so that the next start is a while ahead
            await in_thread(workers.wait_back, 1)
            await in_thread(workers.kill_worker, 1)
        await elsewhere.admin("group.drop", group="old")
        await (await connect(workers.address_of(0), "new-1", fanout("trade"))).goodbye()
        await (await connect(workers.address_of(0), "new-2", fanout("trade"))).goodbye()
        await in_thread(workers.wait_back, 1)
        client = await connect(workers.address_of(1), "producers")
        assert await groups_of_next(client) == 2
        assert {row["group"] for row in await client.admin("group.list") if row["bindings"]} == {"new-1", "new-2"}


async def test_a_dropped_group_is_dropped_at_all_workers(tmp_path: Path) -> None:
    async with running(WorkerSet(tmp_path, 3)) as workers:
        await (await connect(workers.address_of(2), "g", fanout("trade"))).goodbye()
        clients = [await connect(address, "producers") for address in workers.addresses]
        for client in clients:
            await wait_groups(client, 1)
        await clients[1].admin("group.drop", group="g")
        for client in clients:
            await wait_groups(client, 0)


async def test_bindings_survive_the_end_of_the_set(tmp_path: Path) -> None:
    workers = WorkerSet(tmp_path, 2)
    async with running(workers):
        await (await connect(workers.address_of(1), "g", fanout("trade"))).goodbye()
        await wait_groups(await connect(workers.address_of(0), "producers"), 1)
    async with running(workers):
        for address in workers.addresses:
            assert await groups_of_next(await connect(address, "producers")) == 1


def test_a_port_that_is_taken_ends_the_start(tmp_path: Path) -> None:
    port = free_ports(3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port + 1))
        listener.listen()
        done = kiteq(tmp_path, "--workers", "3", "--bind", f"127.0.0.1:{port}")
    assert done.returncode == 1
    assert f"kiteq: cannot listen on 127.0.0.1:{port + 1}: another process listens there\n" in done.stderr
    assert "Ctrl-C" not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_store_that_is_in_use_ends_the_start(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path, database=f"lmdb://{tmp_path}/s/worker-1"):
        done = kiteq(tmp_path, "--workers", "2", "--bind", f"127.0.0.1:{free_ports(2)}", "--db", "lmdb://./s")
    assert done.returncode == 1
    assert "kiteq: another broker owns the store's folder s/worker-1" in done.stderr


async def test_a_single_broker_grows_into_workers_and_fewer_than_there_were_are_refused(tmp_path: Path) -> None:
    database = f"lmdb://{tmp_path}/store"
    async with BrokerProcess(tmp_path, database=database) as single:
        client = await connect(single.address, "g", fanout("trade"))
        await client.publish([hello(7)])
        await client.goodbye()
        await trio.to_thread.run_sync(single.stop)
    workers = WorkerSet(tmp_path, 3, database=database)
    async with running(workers):
        client = await connect(workers.address, "g", window=1)
        deliveries = await client.take(1)
        assert deliveries[0].number == 7
        await client.ack(deliveries)
        assert (tmp_path / "store" / "worker-2" / "data.mdb").exists()
    for words, at_least in ((["--workers", "2"], "worker-2"), ([], "worker-1")):
        sentence = await trio.to_thread.run_sync(partial(refused, tmp_path, *words, "--db", database, status=2))
        assert sentence.startswith(f"the folder {tmp_path}/store/{at_least} holds what waits at worker {at_least[-1]}")
        assert "start with --workers 3" in sentence
