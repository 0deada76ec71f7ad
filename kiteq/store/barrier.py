"""Waiting for the store's writer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from kiteq.store.store import Store

__all__ = ["durable"]


async def durable(store: Store) -> None:
    """Wait until all that was submitted so far is durable, or was refused."""
    finished = trio.Event()
    store.on_durable(finished.set)
    await finished.wait()
