"""Message ids: 16 bytes, by default a UUIDv7, so that ids of one producer sort by time."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator

__all__ = ["check_id", "new_id"]

_RANDOM = struct.Struct(">HQ")
_ID = struct.Struct(">QQ")
_RANDOM_POOL_BYTES = 1_000 * _RANDOM.size
_random: Iterator[tuple[int, ...]] = iter(())
"""Random numbers fetched ahead: a call of the system for each id took two thirds of the time of making one."""


def _forget_random() -> None:
    """Let a forked process draw its own random numbers: two must never make the same id."""
    global _random  # noqa: PLW0603 one pool for each process
    _random = iter(())


os.register_at_fork(after_in_child=_forget_random)


def new_id() -> bytes:
    """Return a new message id: a UUIDv7 (RFC 9562, section 5.7), so ids of one producer sort by time."""
    global _random  # noqa: PLW0603 refilled when it is used up
    numbers = next(_random, None)
    if numbers is None:
        _random = _RANDOM.iter_unpack(os.urandom(_RANDOM_POOL_BYTES))
        numbers = next(_random)
    a, b = numbers
    ms = time.time_ns() // 1_000_000
    return _ID.pack(ms << 16 | 0x7000 | a & 0xFFF, 0x8000000000000000 | b & 0x3FFFFFFFFFFFFFFF)


def check_id(value: bytes | str) -> bytes:
    """Return an id as 16 bytes. Raises `ValueError`."""
    if isinstance(value, str):
        try:
            value = bytes.fromhex(value.replace("-", ""))
        except ValueError:
            raise ValueError("a message id as str must be 32 hex digits") from None
    if type(value) is not bytes or len(value) != 16:
        raise ValueError("a message id must be 16 bytes, or 32 hex digits")
    return value
