"""Orders sent through several brokers, to see what happens when one dies: `python examples/several.py MODE`."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

from kiteq_client import Client, Message, Received, SendTimeout, fanout

BROKER = os.environ.get("KITEQ_BROKER", "zk://127.0.0.1:2181")
MODES = ("produce", "consume")
SENDERS = 10
PAUSE_SECONDS = 0.1


class Producer:
    """Sends numbered orders, some at a time."""

    def __init__(self) -> None:
        self.numbers: Iterator[int] = itertools.count(1)
        self.sent = 0

    async def send(self, client: Client) -> None:
        while True:
            message = Message("trade", "order", str(next(self.numbers)))
            while True:
                try:
                    await client.send(message)
                    break
                except SendTimeout as error:  # on disk or not: send the same again, it may then come twice
                    print(f"order {message.text}: {error}", flush=True)
            self.sent += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def run(self) -> None:
        try:
            async with Client(BROKER, group="orders", topics=["trade"]) as client, asyncio.TaskGroup() as tasks:
                for _ in range(SENDERS):
                    tasks.create_task(self.send(client))
                await self.report(client)
        finally:
            print(f"{self.sent} sent")

    async def report(self, client: Client) -> None:
        while True:
            await asyncio.sleep(1)
            print(f"{self.sent} sent; connected:", *sorted(client.statistics().connected), flush=True)


class Consumer:
    """Notes which orders have come."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.again = 0

    async def handle(self, message: Received) -> None:
        self.again += message.text in self.seen
        self.seen.add(message.text)

    async def run(self) -> None:
        bindings = [fanout("trade")]
        async with Client(BROKER, group="till", bindings=bindings, on_message=self.handle) as client:
            report = asyncio.create_task(self.report(client))
            await client.run()  # until Ctrl-C
            report.cancel()
        print(f"{len(self.seen)} received, {self.again} of them again")

    async def report(self, client: Client) -> None:
        while True:
            await asyncio.sleep(1)
            connected = sorted(client.statistics().connected)
            print(f"{len(self.seen)} received, {self.again} of them again; connected:", *connected, flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in MODES:
        sys.exit(f"usage: python examples/several.py {'|'.join(MODES)}")
    with suppress(KeyboardInterrupt):
        asyncio.run(Producer().run() if sys.argv[1] == "produce" else Consumer().run())
