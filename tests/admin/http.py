"""The HTTP port of a broker in this process, and the plainest client of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import trio
from starlette.types import ASGIApp

from kiteq.admin.server import serve_application, serve_http
from kiteq.broker import Broker, address_of, listen
from kiteq.clock import SystemClock
from tests.e2e.wire import PATIENCE_SECONDS, running

__all__ = ["Answer", "answering", "ask", "get", "port_open", "read_answer", "serving"]


class Answer(NamedTuple):
    """What came back; the names of headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@asynccontextmanager
async def serving(
    folder: Path | str, clock: SystemClock | None = None, **settings: Any
) -> AsyncIterator[tuple[Broker, str]]:
    """Run a broker with an HTTP port; yield it and the address of that port."""
    with listen("127.0.0.1:0") as listener:
        address = address_of(listener)
        async with running(folder, clock, **settings) as broker, trio.open_nursery() as nursery:
            nursery.start_soon(serve_http, broker.core, listener)
            yield broker, address
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def answering(application: ASGIApp) -> AsyncIterator[str]:
    """Serve an application as the broker's is served; yield the address."""
    with listen("127.0.0.1:0") as listener:
        address = address_of(listener)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_application, application, listener)
            yield address
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def port_open(address: str) -> AsyncIterator[trio.SocketStream]:
    """Connect to an address; yield the connection."""
    host, _, port = address.rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    async with stream:
        yield stream


async def read_answer(stream: trio.SocketStream) -> Answer:
    """Read until the other side closes."""
    text = bytearray()
    with trio.fail_after(PATIENCE_SECONDS):
        async for chunk in stream:
            text += chunk
    head, _, body = bytes(text).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split()[1]), headers, body)


async def ask(address: str, request: str) -> Answer:
    """Send a request as it stands, with the line ends of HTTP, and read until the end of the connection."""
    async with port_open(address) as stream:
        await stream.send_all(request.replace("\n", "\r\n").encode())
        return await read_answer(stream)


async def get(address: str, path: str, *more: str, method: str = "GET") -> Answer:
    """Ask for a path, with more lines of the head."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {address}", "connection: close", *more]
    return await ask(address, "\n".join(lines) + "\n\n")
