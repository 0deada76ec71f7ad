"""One broker of a set, as a process of its own: `python -m kiteq.cli.worker NUMBER DESCRIPTOR`.

It is started by the process that runs the workers, gets its settings over the descriptor, and drains when
that process says so or is gone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from kiteq import logs
from kiteq.broker import Broker, address_of, listen, serve
from kiteq.cli.failing import STATUS_FAILED, sentence_and_status
from kiteq.config import Settings
from kiteq.pipe.neighbours import set_neighbours
from kiteq.workers.channel import Channel
from kiteq.workers.sharing import SharedRegistry

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["main"]


def main() -> None:
    """Run a worker and end the process with its status."""
    logs.configure()
    number, descriptor = map(int, sys.argv[1:3])
    end = socket.socket(fileno=descriptor)
    end.set_inheritable(False)
    end.setblocking(False)
    sys.exit(trio.run(_Worker(number, end).run))


class _Worker:
    """A broker and its end of the channel."""

    def __init__(self, number: int, end: socket.socket) -> None:
        self._number = number
        self._channel = Channel(end)
        self._registry = SharedRegistry(self._channel)
        self._broker: Broker | None = None
        self._draining = False
        self._settings = trio.Event()
        self._given = Settings()

    async def run(self) -> int:
        """Serve until drained; return the exit status."""
        try:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._channel.write)
                    nursery.start_soon(self._listen, nursery)
                    nursery.start_soon(self._obey_signals, signals, nursery)
                    await self._settings.wait()
                    await self._serve(nursery)
                    nursery.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001 its other end tells it, or a log line
            known = sentence_and_status(error)
            if known is None:
                structlog.get_logger().exception("a worker has failed", exc_info=error)
                return STATUS_FAILED
            await self._tell_failure(*known)
            return known[1]
        return 0

    async def _serve(self, nursery: trio.Nursery) -> None:
        settings = self._given
        with nullcontext() if settings.http_address is None else listen(settings.http_address) as listener:
            http = None if listener is None else address_of(listener)
            opening = self._registry.open if settings.zkhost is None else None
            async with trio.open_nursery() as broker:
                run = partial(
                    serve,
                    settings,
                    open_registry=opening,
                    partitions=(self._number,),
                    beside=partial(self._beside, listener),
                )
                self._broker = await broker.start(run)
                self._channel.post("ready", self._broker.address, http)

    async def _beside(self, listener: socket.socket | None, core: Core) -> None:
        async with trio.open_nursery() as nursery:
            if listener is not None:
                from kiteq.admin.server import serve_http

                nursery.start_soon(serve_http, core, listener)
            await core.stop_wanted.wait()
            self._channel.post("stop")

    async def _listen(self, nursery: trio.Nursery) -> None:
        while (message := await self._channel.receive()) is not None:
            match message:
                case ("settings", fields):
                    self._given = Settings(**fields)
                    logs.configure(self._given.log_level, self._given.log_format)
                    _log_with(self._number)
                    self._settings.set()
                case ("neighbours", addresses):
                    assert self._broker is not None  # they are told when it is ready
                    set_neighbours(self._broker.core, addresses)
                case ("drain",):
                    self._drain(nursery)
                case _:
                    self._registry.take(message)
        self._registry.lost()
        structlog.get_logger().warning("the process that runs the workers is gone: draining")
        self._drain(nursery)

    async def _obey_signals(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        count = 0
        async for number in signals:
            count += 1
            if count > 1:
                os._exit(128 + number)
            self._drain(nursery)

    def _drain(self, nursery: trio.Nursery) -> None:
        if self._draining:
            return
        self._draining = True
        if self._broker is None:
            nursery.cancel_scope.cancel()
        else:
            nursery.start_soon(self._broker.drain)

    async def _tell_failure(self, sentence: str, status: int) -> None:
        self._channel.post("failed", sentence, status)
        if not await self._channel.flush():
            print(f"kiteq: {sentence}", file=sys.stderr)


def _log_with(number: int) -> None:
    """Have every line say which worker it is of, those of threads too."""

    def add_worker(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["worker"] = number
        return event

    structlog.configure(processors=[add_worker, *structlog.get_config()["processors"]])


if __name__ == "__main__":
    main()
