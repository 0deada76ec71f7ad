"""Runs several brokers behind one command until a signal asks them to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import structlog
import trio

from kiteq import logs
from kiteq.cli.failing import CommandFailed
from kiteq.cli.introduction import introduction
from kiteq.config import Resolved, Settings
from kiteq.workers.supervisor import Supervisor, WorkerFailed

__all__ = ["run"]


def run(resolved: Resolved) -> None:
    """Serve until the workers are drained."""
    settings = resolved.settings
    logs.configure(settings.log_level, settings.log_format)
    for variable, nearest in resolved.misspelt:
        structlog.get_logger().warning("unknown environment variable", variable=variable, did_you_mean=nearest)
    try:
        trio.run(_until_stopped, settings)
    except WorkerFailed as error:
        raise CommandFailed(str(error), error.status) from error


async def _until_stopped(settings: Settings) -> None:
    def introduce() -> None:
        listening = [(one.address or "", one.http) for one in supervisor.members]
        _say(introduction(settings, listening))

    supervisor = Supervisor(settings, introduce)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, signals, supervisor)
            await supervisor.run()
            nursery.cancel_scope.cancel()


async def _obey(signals: AsyncIterator[int], supervisor: Supervisor) -> None:
    is_stopping = False
    async for number in signals:
        if is_stopping:
            supervisor.kill()
            os._exit(128 + number)
        is_stopping = True
        _say("stopping: clients may finish what they hold; a second signal ends at once")
        supervisor.drain()


def _say(text: str) -> None:
    # Nobody may be reading (`kiteq | head -1`); that is no reason to stop.
    with suppress(OSError):
        print(text, flush=True)
