"""Runs a broker until a signal asks it to stop."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial

import structlog
import trio

from kiteq import logs
from kiteq.broker import Broker, address_of, listen, serve
from kiteq.cli.introduction import introduction
from kiteq.config import Resolved, Settings

__all__ = ["run"]


def run(resolved: Resolved) -> None:
    """Serve until the broker is drained."""
    settings = resolved.settings
    logs.configure(settings.log_level, settings.log_format)
    for variable, nearest in resolved.misspelt:
        structlog.get_logger().warning("unknown environment variable", variable=variable, did_you_mean=nearest)
    trio.run(_Run(settings).until_stopped)


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
                nursery.start_soon(self._obey, signals, nursery)
                self.broker = await nursery.start(self._serve, nursery, listener)
                http = None if listener is None else address_of(listener)
                _say(introduction(self.settings, [(self.broker.address, http)]))

    async def _serve(
        self, nursery: trio.Nursery, listener: socket.socket | None, *, task_status: trio.TaskStatus[Broker]
    ) -> None:
        beside = None
        if listener is not None:
            from kiteq.admin.server import serve_http

            beside = partial(serve_http, listener=listener)
        await serve(self.settings, beside=beside, task_status=task_status)
        nursery.cancel_scope.cancel()

    async def _obey(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        is_stopping = False
        async for number in signals:
            if is_stopping:
                os._exit(128 + number)
            is_stopping = True
            if self.broker is None:
                nursery.cancel_scope.cancel()
            else:
                _say("stopping: clients may finish what they hold; a second signal ends at once")
                nursery.start_soon(self.broker.drain)


def _say(text: str) -> None:
    # Nobody may be reading (`kiteq | head -1`); that is no reason to stop.
    with suppress(OSError):
        print(text, flush=True)
