"""Writes the sample of the present store format: `python -m tests.versions.sample`, before the format changes.

`test_stores.py` then holds every later release to what is owed to the groups of this store.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Final

import trio

from kiteq.store.lmdb import LmdbTables
from kiteq.store.recovery import FORMAT_VERSION
from kiteq.store.tables import Table
from kiteq_client import Client, Message, Received, Reject, RetryAfter, direct, fanout, regex
from tests.support.broker import BrokerProcess

STORES: Final = Path(__file__).parent / "stores"
BYTES_MAX: Final = 64 << 20
END: Final = b"\xff" * 64
HOUR_S: Final = 3_600


def id_of(number: int, message: int) -> bytes:
    """Return the id of a message of the sample of a format."""
    return bytes([number]) * 15 + bytes([message])


def message(number: int, topic: str, message_type: str, body: str, *, delay: float | None = None) -> Message:
    return Message(topic, message_type, body, id=id_of(FORMAT_VERSION, number), delay=delay)


async def tell(url: str) -> None:
    """Let a broker have something of every kind."""
    async with Client(url, group="audit", bindings=[regex("trade", "pay-.*", watermark=1000)]):
        pass
    async with Client(url, group="feeders", bindings=[fanout("feed")]):
        pass
    topics = ["trade", "feed"]
    async with Client(url, group="members", bindings=[direct("trade", "pay-succ")], topics=topics) as client:
        for number in range(5):
            order = Message(
                "trade", "pay-succ", f"order {number}", id=id_of(FORMAT_VERSION, number), properties={"n": str(number)}
            )
            await client.send(order)
        await client.send(message(10, "feed", "reject", "bad"))
        await client.send(message(11, "feed", "retry", "later"))
        await client.send(message(12, "trade", "nobody", "kept apart"))
        acked = 0
        async for delivery in client.deliveries():
            await delivery.ack()
            acked += 1
            if acked == 2:
                break
    failed = 0
    both_failed = trio.Event()

    async def feed(delivered: Received) -> None:
        nonlocal failed
        failed += 1
        if failed == 2:
            both_failed.set()
        if delivered.message_type == "reject":
            raise Reject("cannot be handled")
        raise RetryAfter(HOUR_S, "the bank is closed")

    async with Client(url, group="feeders", on_message=feed):
        await both_failed.wait()
    async with Client(url, group="shop", topics=["trade"]) as client:
        await client.prepare(message(20, "trade", "pay-succ", "undecided"), check_after=HOUR_S)
        await client.commit(await client.prepare(message(21, "trade", "pay-succ", "committed")))
        await client.rollback(await client.prepare(message(22, "trade", "pay-succ", "rolled back")))
        await client.send(message(23, "trade", "pay-succ", "delayed", delay=HOUR_S))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with BrokerProcess(Path(folder)) as broker:
            trio.run(tell, f"kiteq://{broker.address}")
            broker.stop()
        tables = LmdbTables(Path(folder) / "store", BYTES_MAX)
        rows = [[int(table), key.hex(), row.hex()] for table in Table for key, row in tables.scan(table, b"", END)]
        tables.close()
    content = {"format": FORMAT_VERSION, "written_ms": int(time.time() * 1000), "rows": rows}
    path = STORES / f"format{FORMAT_VERSION}.json"
    path.write_text(json.dumps(content).replace("[[", "[\n[").replace("], [", "],\n[") + "\n")
    print(f"{path} has {len(rows)} rows")  # noqa: T201 for who has called it


if __name__ == "__main__":
    main()
