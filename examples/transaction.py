"""A message bound to a database transaction that you can crash: `python examples/transaction.py MODE`."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from kiteq_client import Client, Decision, Message, Received, Transaction
from kiteq_client.marker import Marker

FOLDER = Path("kiteq-demo")
BROKER = os.environ.get("KITEQ_BROKER", "127.0.0.1:13800")
MODES = ("commit", "rollback", "crash-before-commit", "crash-after-commit", "answer")


def connect() -> sqlite3.Connection:
    return sqlite3.connect(FOLDER / "transaction.db")


def crash() -> None:
    print("killing myself, as kill -9 does", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


class TalkingMarker(Marker):
    """The marker answers the broker's checks; this one says so."""

    async def check(self, message: Received) -> Decision:
        decision = await super().check(message)
        print(f"the broker asks about {message.text!r}: {decision.value}", flush=True)
        return decision


def open_database() -> TalkingMarker:
    """Create what is not there: our table, and the marker's."""
    FOLDER.mkdir(exist_ok=True)
    with closing(connect()) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY)")
    marker = TalkingMarker(connect)
    marker.create_table()
    return marker


def write_order(marker: Marker, tx: Transaction, mode: str) -> None:
    """Do the local transaction: one row of ours, and the marker's row."""
    with closing(connect()) as connection:
        marker.mark(connection, tx)
        number = connection.execute("INSERT INTO orders DEFAULT VALUES").lastrowid
        print(f"order {number} written, not committed yet", flush=True)
        if mode == "crash-before-commit":
            crash()
        if mode == "rollback":
            connection.rollback()
            print("database rolled back", flush=True)
        else:
            connection.commit()
            print("database committed", flush=True)


async def main(mode: str, marker: TalkingMarker) -> None:
    client = Client(f"kiteq://{BROKER}", group="shop", topics=["trade"], on_check=marker)
    async with client:
        if mode != "answer":
            async with client.transaction(Message("trade", "order-placed", f"order ({mode})")) as tx:
                print("half message stored, delivered to nobody yet", flush=True)
                await asyncio.to_thread(write_order, marker, tx, mode)
                if mode == "crash-after-commit":
                    crash()
            print(f"message {tx.outcome}", flush=True)
        print("answering the broker; Ctrl-C ends", flush=True)
        await client.run()
    await marker.aclose()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in MODES:
        sys.exit(f"usage: python examples/transaction.py {'|'.join(MODES)}")
    asyncio.run(main(sys.argv[1], open_database()))
