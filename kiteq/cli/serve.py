"""Runs a broker until a signal asks it to stop."""

from __future__ import annotations

import signal
import socket
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import trio

from kiteq.broker import Broker, address_of, listen, serve
from kiteq.cli.foreground import begin_log, obey, say, say_stopping
from kiteq.cli.introduction import introduction
from kiteq.config import Resolved, Settings

__all__ = ["run"]


def run(resolved: Resolved) -> None:
    """Serve until the broker is drained."""
    begin_log(resolved)
    trio.run(_Run(resolved.settings).until_stopped)


@dataclass
class _Run:
    settings: Settings
    broker: Broker | None = None

    async def until_stopped(self) -> None:
        http = self.settings.http_address
        with (
            nullcontext() if http is None else listen(http) as listener,
            trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(obey, signals, partial(self._stop, nursery))
                self.broker = await nursery.start(self._serve, nursery, listener)
                http = None if listener is None else address_of(listener)
                say(introduction(self.settings, [(self.broker.address, http)]))

    async def _serve(
        self, nursery: trio.Nursery, listener: socket.socket | None, *, task_status: trio.TaskStatus[Broker]
    ) -> None:
        beside = None
        if listener is not None:
            from kiteq.admin.server import serve_http

            beside = partial(serve_http, listener=listener)
        await serve(self.settings, beside=beside, task_status=task_status)
        nursery.cancel_scope.cancel()

    def _stop(self, nursery: trio.Nursery) -> None:
        if self.broker is None:
            nursery.cancel_scope.cancel()
        else:
            say_stopping()
            nursery.start_soon(self.broker.drain)
