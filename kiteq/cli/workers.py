"""Runs several brokers behind one command until a signal asks them to stop."""

from __future__ import annotations

import signal

import trio

from kiteq.cli.failing import CommandFailed
from kiteq.cli.foreground import begin_log, obey, say, say_stopping
from kiteq.cli.introduction import introduction
from kiteq.config import Resolved, Settings
from kiteq.workers.supervisor import Supervisor, WorkerFailed

__all__ = ["run"]


def run(resolved: Resolved) -> None:
    """Serve until the workers are drained."""
    begin_log(resolved)
    try:
        trio.run(_until_stopped, resolved.settings)
    except WorkerFailed as error:
        raise CommandFailed(str(error), error.status) from error


async def _until_stopped(settings: Settings) -> None:
    def introduce() -> None:
        listening = [(one.address or "", one.http) for one in supervisor.members]
        say(introduction(settings, listening))

    def stop() -> None:
        say_stopping()
        supervisor.drain()

    supervisor = Supervisor(settings, introduce)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, signals, stop, supervisor.kill)
            await supervisor.run()
            nursery.cancel_scope.cancel()
