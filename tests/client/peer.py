"""A broker that follows a script, for what a real one does only in bad moments; and both event loops."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from kiteq.limits import MIB
from kiteq.message import Message
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import Ack, Deliver, Goodbye, Hello, Nack, Packet, Ping, Publish, Receipts, Settled, Welcome

P = TypeVar("P")
Script = Callable[["Connection"], Awaitable[None]]

LIMITS = {
    "frame_bytes": 2 * MIB,
    "body_bytes": MIB,
    "heartbeat_ms": 10_000,
    "idle_ms": 35_000,
    "ack_deadline_ms": 60_000,
}


def both_loops(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[str], None]:
    """Run an async test under asyncio and under trio, for at most five seconds each."""

    async def bounded() -> None:
        with anyio.fail_after(5):
            await test()

    @pytest.mark.parametrize("loop", ["asyncio", "trio"])
    def run(loop: str) -> None:
        anyio.run(bounded, backend=loop)

    functools.update_wrapper(run, test)
    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would see the async function
    run.__signature__ = inspect.Signature([inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)])  # type: ignore[attr-defined]
    return run


class Connection:
    """The broker's end of one connection."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self.hello: Hello | None = None
        self._decoder = Decoder(64 * MIB)
        self._packets: list[Packet] = []
        self._sending = anyio.Lock()

    async def receive(self) -> Packet:
        while not self._packets:
            self._packets = self._decoder.feed(await self.stream.receive())
        return self._packets.pop(0)

    async def expect(self, kind: type[P]) -> P:
        """Return the next packet, which must be of this kind; pings do not count."""
        while isinstance(packet := await self.receive(), Ping):
            pass
        assert isinstance(packet, kind), packet
        return packet

    async def send(self, *packets: Packet) -> None:
        async with self._sending:  # a test may ask while the script answers
            await self.stream.send(b"".join(map(encode_packet, packets)))

    async def accept(self, *, broker: str = "b1", version: int = 1, **limits: int) -> None:
        self.hello = await self.expect(Hello)
        await self.send(Welcome(self.hello.request, version, broker, LIMITS | limits, admin=True))

    async def deliver(self, *messages: Message | bytes, first_tag: int = 1, attempts: int = 1) -> None:
        blobs = [message if isinstance(message, bytes) else message.encoded() for message in messages]
        await self.send(Deliver(0, first_tag, attempts, blobs))

    async def serve(self, seen: list[Packet] | None = None) -> None:
        """Answer everything well until the client says goodbye or is gone."""
        while True:
            try:
                packet = await self.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                return
            if seen is not None:
                seen.append(packet)
            if isinstance(packet, Publish):
                await self.send(Receipts(packet.request, 1, True, []))
            elif isinstance(packet, Ack | Nack):
                await self.send(Settled(packet.request, []))
            elif isinstance(packet, Goodbye):
                return


async def well(connection: Connection) -> None:
    await connection.accept()
    await connection.serve()


@asynccontextmanager
async def peer(*scripts: Script) -> AsyncIterator[str]:
    """Yield the address of a broker whose n-th connection follows the n-th script, later ones the last."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    connections = 0

    async def handle(stream: SocketStream) -> None:
        nonlocal connections
        script = scripts[min(connections, len(scripts) - 1)]
        connections += 1
        async with stream:
            try:
                await script(Connection(stream))
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                return

    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        try:
            yield f"127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        finally:
            tasks.cancel_scope.cancel()
