"""The process that runs the workers, inside a test; the workers are processes of their own."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from kiteq.config import Settings
from kiteq.remoting import packets
from kiteq.workers import supervisor as supervisor_module
from kiteq.workers.supervisor import Supervisor, WorkerFailed
from tests.workers.parts import PATIENCE_SECONDS, connect, free_ports

pytestmark = pytest.mark.slow


@asynccontextmanager
async def supervised(settings: Settings) -> AsyncIterator[Supervisor]:
    """Run a set in this process until the block ends."""
    ready = trio.Event()
    supervisor = Supervisor(settings, ready.set)
    with trio.fail_after(2 * PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run)
            await ready.wait()
            yield supervisor
            supervisor.drain()


async def test_a_port_that_was_free_is_kept_over_a_restart() -> None:
    settings = Settings(bind="127.0.0.1:0", pport="0", workers=2, db="memory://")
    async with supervised(settings) as supervisor:
        addresses = [one.address for one in supervisor.members]
        second = supervisor.members[1]
        http, process = second.http, second.process
        assert process is not None
        process.kill()
        while second.process is process or not second.is_open:  # noqa: ASYNC110
            await trio.sleep(0.02)
        assert second.address is not None
        client = await connect(second.address, "g")
        assert (await client.wait(packets.Brokers)).addresses == addresses
        assert [one.address for one in supervisor.members] == addresses
        assert second.http == http
        await client.goodbye()


async def test_a_worker_that_cannot_start_ends_the_others() -> None:
    port = free_ports(2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port + 1))
        listener.listen()
        supervisor = Supervisor(Settings(bind=f"127.0.0.1:{port}", workers=2, db="memory://"))
        with trio.fail_after(2 * PATIENCE_SECONDS), pytest.raises(WorkerFailed) as caught:
            await supervisor.run()
    assert str(caught.value) == f"cannot listen on 127.0.0.1:{port + 1}: another process listens there"
    assert caught.value.status == 1
    assert supervisor.members[0].process is not None
    assert supervisor.members[0].process.returncode == 0


async def test_a_wrong_setting_ends_with_the_status_of_a_single_broker(tmp_path: Path) -> None:
    settings = Settings(bind="127.0.0.1:0", workers=2, db=f"lmdb://{tmp_path}", handlers=("no_such_module:Handler",))
    with trio.fail_after(2 * PATIENCE_SECONDS), pytest.raises(WorkerFailed, match="no_such_module") as caught:
        await Supervisor(settings).run()
    assert caught.value.status == 2


async def test_a_set_that_is_drained_before_it_serves_just_ends() -> None:
    supervisor = Supervisor(Settings(bind="127.0.0.1:0", workers=2, db="memory://"))
    with trio.fail_after(2 * PATIENCE_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.run)
            await trio.testing.wait_all_tasks_blocked()
            supervisor.drain()
    assert [one.address for one in supervisor.members] == [None, None]


async def test_a_worker_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "DRAIN_MARGIN_SECONDS", 1.0)
    settings = Settings(bind="127.0.0.1:0", workers=2, db="memory://", drain_timeout=0.0)
    async with supervised(settings) as supervisor:
        process = supervisor.members[1].process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
    assert process.returncode == -signal.SIGKILL


async def test_a_process_that_cannot_be_made_ends_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with (
        trio.fail_after(PATIENCE_SECONDS),
        pytest.raises(WorkerFailed, match=r"worker \d cannot be started: ") as caught,
    ):
        await Supervisor(Settings(bind="127.0.0.1:0", workers=2, db="memory://")).run()
    assert caught.value.status == 1


async def test_modules_of_the_current_folder_stay_out_of_a_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "structlog.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    async with supervised(Settings(bind="127.0.0.1:0", workers=2, db="memory://")):
        pass
