"""Runs a broker until a signal asks it to stop."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import structlog
import trio

from kiteq import __version__, limits, logs
from kiteq.broker import Broker, address_of, listen, serve
from kiteq.config import Resolved, Settings
from kiteq.values import is_loopback, size_text, split_address

__all__ = ["run"]

DEFAULT_ADDRESS = Settings().bind
IN_MEMORY = frozenset({"memory", "mock"})


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
                _say(introduction(self.settings, self.broker.address, http))

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


def introduction(settings: Settings, address: str, http: str | None = None) -> str:
    """Return in plain words what this broker uses, and how to try it; http: HOST:PORT of the HTTP port."""
    parts = urlsplit(settings.db)
    if parts.scheme in IN_MEMORY:
        store = f"{settings.db}, in memory only: everything is gone when it stops"
    else:
        folder = Path(parts.netloc + parts.path).resolve()
        store = f"{settings.db}, that is {folder}, at most {size_text(settings.store_limit)}"
    flush = {
        "sync": "given when the message is on disk (--flush sync)",
        "async": "given before the message is on disk: a crash may lose some (--flush async)",
    }[settings.flush]
    if parts.scheme in IN_MEMORY:
        flush = "given when the message is in memory"
    host = split_address(address)[0]
    clients = "only from this machine, and every one of them is an administrator"
    if not is_loopback(host):
        clients = "from every machine that reaches this one, without a password (--insecure); those here administrate"
    lines = {
        "store": store,
        "receipts": flush,
        "topics": ", ".join(settings.topics) or f"any name, up to {limits.TOPICS_MAX:,}",
        "registry": "embedded: bindings are kept in the store",
        "clients": clients,
    }
    if settings.zkhost is not None:
        announced = settings.advertise or address
        lines["registry"] = f"{settings.zkhost}, where clients find this broker as {announced}"
    elif settings.advertise is not None:
        lines["advertise"] = f"{settings.advertise}, which nobody asks for without --zkhost"
    if http is not None:
        lines["http"] = f"http://{http} has /stat, /binds, /healthz and /metrics"
    if settings.handlers:
        lines["handlers"] = ", ".join(settings.handlers)
    described = "\n".join(f"  {name:<10}{text}" for name, text in lines.items())
    topic = settings.topics[0] if settings.topics else "trade"
    where = "" if address == DEFAULT_ADDRESS else f" --broker {_reachable(address)}"
    return (
        f"kiteq {__version__} serves on {address}\n{described}\n"
        f"Try it in two other terminals:\n  kiteq listen {topic}{where}\n  kiteq send {topic} greeting hello{where}\n"
        "Stop it with Ctrl-C."
    )


def _reachable(address: str) -> str:
    host, port = split_address(address)
    return f"127.0.0.1:{port}" if host in {"0.0.0.0", "::"} else address  # noqa: S104 compared, not bound
