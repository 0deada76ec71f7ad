"""Waiting for the end that the operating system asks for."""

from __future__ import annotations

import logging
import signal
import threading

import anyio

__all__ = ["wait_signal_or"]

logger = logging.getLogger("kiteq_client")


async def wait_signal_or(event: anyio.Event) -> None:
    """Return at SIGTERM, SIGINT or when `event` is set. Only the main thread can hear signals."""
    if threading.current_thread() is not threading.main_thread():
        await event.wait()
        return
    over = anyio.Event()

    async def wait_event() -> None:
        await event.wait()
        over.set()

    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

        async def wait_signal() -> None:
            async for number in signals:
                logger.info("%s: leaving", number.name)
                over.set()
                return

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_event)
            tasks.start_soon(wait_signal)
            await over.wait()
            tasks.cancel_scope.cancel()
