"""Messages between the process that runs the workers and one of them: msgpack lists over a socket pair.

    to the worker       settings [fields] · neighbours [addresses] · nodes [[topic, group, bindings or nil], ...]
                        opened · done [request, code, reason] · drain
    from the worker     ready [address, http address] · failed [sentence, status] · stop
                        known [[topic, group, bindings], ...] · open
                        merge / remove [request, topic, group, bindings]

Bindings travel as on the wire. The end of the stream means that the other process has ended.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgpack
import trio

__all__ = ["NODES_PER_MESSAGE", "Channel", "Message"]

Message = tuple[Any, ...]
READ_BYTES: Final = 256 * 1024
MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
"""More is a defect: what can be long is sent in parts."""
NODES_PER_MESSAGE: Final = 256
"""Few enough that reading one message is no pause."""


def _nothing() -> Iterable[Message]:
    return ()


class Channel:
    """One end of the socket pair.

    changes: called before each write; what it returns goes ahead of what was posted.
    """

    def __init__(self, end: socket.socket, changes: Callable[[], Iterable[Message]] = _nothing) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(end))
        self._changes = changes
        self._posted: deque[Message] = deque()
        self._bell = trio.Event()
        self._is_whole = True
        self._unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=MESSAGE_BYTES_MAX)

    def post(self, *message: Any) -> None:
        """Have a message written after those before it."""
        self._posted.append(message)
        self._bell.set()

    def ring(self) -> None:
        """Have the changes written."""
        self._bell.set()

    async def write(self) -> None:
        """Write what is posted until cancelled, or until the other process has ended."""
        while True:
            await self._bell.wait()
            self._bell = trio.Event()
            if not await self.flush():
                return

    async def flush(self) -> bool:
        """Write what is posted now; return whether the other process still reads."""
        messages = [*self._changes(), *self._posted]
        self._posted.clear()
        try:
            for message in messages if self._is_whole else ():
                self._is_whole = False  # what is cut short by a cancellation must not be followed by anything
                await self._stream.send_all(msgpack.packb(message))
                self._is_whole = True
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        return self._is_whole

    async def receive(self) -> Message | None:
        """Return the next message, None when the other process has ended."""
        while True:
            for message in self._unpacker:
                return tuple(message)
            try:
                chunk = await self._stream.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not chunk:
                return None
            self._unpacker.feed(chunk)

    def close(self) -> None:
        """Let the other process know that this one is done."""
        self._stream.socket.close()
