"""Serves HTTP beside a broker, with bounds on connections, on sizes and on time.

Requests are parsed and answered by hypercorn. What is done here is what it leaves open: it limits
neither connections nor the time a reader of an answer takes, and a defect in it must not end the broker.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import wrap_app

from kiteq.admin.views import application

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from kiteq.pipe.core import Core

__all__ = ["serve_application", "serve_http"]

CONNECTIONS_MAX: Final = 32
"""Monitoring has one or two; more wait in the listener's queue."""
HEAD_BYTES_MAX: Final = 8 * 1024
"""Request line and headers: no request of ours has a body."""
IDLE_SECONDS_MAX: Final = 5
"""A connection that asks nothing, or has not finished its question, is closed after this."""
READ_SECONDS_MAX: Final = 15
"""Without a byte from the other side, while its answer is made and sent."""
WRITE_SECONDS_MAX: Final = 10.0
"""A reader that takes nothing for this long is cut off."""
WRITE_BYTES: Final = 256 * 1024
"""An answer is sent in pieces of this, each within the time above."""
ACCEPT_PAUSE_SECONDS: Final = 0.1
"""After the process ran out of file descriptors, or the system of memory."""

log = structlog.get_logger()


async def serve_http(core: Core, listener: socket.socket) -> None:
    """Answer for a broker at a listening socket until cancelled; then every connection is closed at once."""
    await serve_application(application(core), listener)


async def serve_application(application: ASGIApp, listener: socket.socket) -> None:
    """Serve an ASGI application at a listening socket until cancelled."""
    config = _config()
    app = wrap_app(application, 0, "asgi")  # type: ignore[arg-type]  # it spells ASGI's types out, others do not
    context = WorkerContext(None)
    places = trio.Semaphore(CONNECTIONS_MAX)
    streams: set[_Stream] = set()

    async def serve_connection(stream: _Stream) -> None:
        streams.add(stream)
        try:
            server: Any = TCPServer(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]  # not TLS
            await server
        except Exception:
            log.exception("an HTTP connection failed")
        finally:
            streams.discard(stream)
            places.release()
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        try:
            while True:
                await places.acquire()
                nursery.start_soon(serve_connection, _Stream(await _accept(accepting)))
        finally:
            listener.close()
            for stream in streams:
                stream.socket.close()  # wakes a send that hypercorn shields from cancellation


async def _accept(listener: trio.SocketListener) -> trio.SocketStream:
    while True:
        try:
            return await listener.accept()
        except OSError as error:
            log.warning("no HTTP connection can be taken now", reason=error.strerror)
            await trio.sleep(ACCEPT_PAUSE_SECONDS)


def _config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = None  # it would print; what fails in a request is logged where it is answered
    config.h11_max_incomplete_size = HEAD_BYTES_MAX
    config.h2_max_concurrent_streams = CONNECTIONS_MAX
    config.h2_max_header_list_size = HEAD_BYTES_MAX
    config.websocket_max_message_size = HEAD_BYTES_MAX
    config.keep_alive_timeout = IDLE_SECONDS_MAX
    config.read_timeout = READ_SECONDS_MAX
    config.include_server_header = False
    return config


class _Stream(trio.abc.HalfCloseableStream):
    """A connection whose sends have a deadline, also those that hypercorn shields from cancellation."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        """hypercorn asks it for the addresses of both sides."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send within bounds of time. Raises `trio.BrokenResourceError` when the other side does not read."""
        view = memoryview(data)
        try:
            for start in range(0, len(view), WRITE_BYTES):
                with trio.fail_after(WRITE_SECONDS_MAX):
                    await self._stream.send_all(view[start : start + WRITE_BYTES])
        except trio.TooSlowError as error:
            self.socket.close()  # so that nobody waits for its questions any more
            raise trio.BrokenResourceError("the answer is not read") from error

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket takes more."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Say that nothing more comes."""
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has come."""
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        """Close the socket."""
        await self._stream.aclose()
