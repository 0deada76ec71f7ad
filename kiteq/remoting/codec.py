"""Bytes to packets and packets to bytes, without I/O.

    frame := u32 big-endian length of what follows | msgpack array [type, request, fields...]

`Decoder.feed` takes whatever a socket read brought and returns the packets that are complete.
"""

from __future__ import annotations

import threading
from typing import Final

import msgpack

from kiteq.errors import LocalProtocolError, RemoteProtocolError
from kiteq.limits import FRAME_ITEMS_MAX
from kiteq.remoting.packets import TYPE_NUMBERS, Packet, parse_packet

__all__ = ["Decoder", "encode_packet"]

LENGTH_BYTES: Final = 4
MAP_ITEMS_MAX: Final = 4_096


class _Packer(threading.local):
    """A packer for each thread: a program may run an async client beside the thread of the blocking ones."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(autoreset=True).pack


_packer = _Packer()


def encode_packet(packet: Packet) -> bytes:
    """Return the frame of a packet."""
    body: bytes = _packer.pack([TYPE_NUMBERS[type(packet)], *packet])
    if len(body) >= 1 << 32:
        raise LocalProtocolError(f"a {type(packet).__name__} of {len(body)} bytes does not fit a frame")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def _refuse_extension(code: int, _content: bytes) -> object:
    raise ValueError(f"msgpack extension type {code} is not used here")


class Decoder:
    """The receiving half of one connection.

    frame_bytes_max: a longer frame is an error as soon as its length is read; may be raised later.
    """

    __slots__ = ("_partial", "_wanted", "frame_bytes_max")

    def __init__(self, frame_bytes_max: int) -> None:
        self._partial = bytearray()
        """The unfinished frame; it grows in place, so that a large frame is not copied at each read."""
        self._wanted = LENGTH_BYTES
        """Nothing can be decoded before this many bytes of it are there."""
        self.frame_bytes_max = frame_bytes_max

    @property
    def has_partial_frame(self) -> bool:
        """Whether bytes of an unfinished frame are held."""
        return bool(self._partial)

    def feed(self, chunk: bytes) -> list[Packet]:
        """Take the bytes of one read; return the packets now complete, in order.

        Raises `RemoteProtocolError`, after which the decoder must not be used again.
        """
        buffer = chunk
        if self._partial:
            self._partial += chunk
            if len(self._partial) < self._wanted:
                return []
            buffer = bytes(self._partial)
            self._partial.clear()
        size = len(buffer)
        packets: list[Packet] = []
        start = 0
        wanted = LENGTH_BYTES
        while size - start >= LENGTH_BYTES:
            body_at = start + LENGTH_BYTES
            length = int.from_bytes(buffer[start:body_at], "big")
            if length > self.frame_bytes_max or length == 0:
                raise RemoteProtocolError(f"a frame of {length} bytes; 1 to {self.frame_bytes_max} are allowed here")
            end = body_at + length
            if end > size:
                wanted = LENGTH_BYTES + length
                break
            packets.append(self._decode(buffer[body_at:end]))
            start = end
        if start < size:
            self._partial += memoryview(buffer)[start:]
            self._wanted = wanted
        return packets

    def _decode(self, body: bytes) -> Packet:
        try:
            fields = msgpack.unpackb(
                body,
                ext_hook=_refuse_extension,
                max_array_len=FRAME_ITEMS_MAX,
                max_map_len=MAP_ITEMS_MAX,
            )
        except (ValueError, TypeError, RecursionError) as error:
            reason = str(error) or type(error).__name__
            raise RemoteProtocolError(f"a frame is not valid msgpack: {reason}"[:200]) from error
        return parse_packet(fields)
