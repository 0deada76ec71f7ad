"""The commands of the demo: `python -m examples.orders --help`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.orders.audit import read_books
from examples.orders.database import Database
from examples.orders.orders import OrderService
from examples.orders.payments import PaymentService
from examples.orders.steps import STEPS
from kiteq_client import Client, Message, NotConnected


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    broker = os.environ.get("KITEQ_BROKER", "127.0.0.1:13800")
    common.add_argument("--broker", default=broker, metavar="HOST:PORT", help="default: %(default)s")
    common.add_argument("--folder", default="kiteq-demo", type=Path, help="of the SQLite files; default: %(default)s")
    common.add_argument("--mariadb", metavar="URL", help="mysql://user:password@host:port, instead of SQLite")

    parser = argparse.ArgumentParser(prog="python -m examples.orders", description="Two services whose money agrees.")
    commands = parser.add_subparsers(dest="command", required=True)
    steps = "die, as by kill -9, the first time this is reached: " + "; ".join(
        f"{step}: {what}" for step, what in STEPS.items()
    )
    for name in ("order-service", "payment-service"):
        service = commands.add_parser(name, parents=[common], help=f"run the {name.replace('-', ' ')}")
        service.add_argument("--crash-at", choices=STEPS, metavar="STEP", help=steps)
    shop = commands.add_parser("shop", parents=[common], help="order something")
    shop.add_argument("--orders", type=int, default=20, metavar="N", help="default: %(default)s")
    commands.add_parser("audit", parents=[common], help="say whether the balances agree")
    return parser.parse_args(words)


async def shop(broker: str, count: int) -> None:
    """Send what customers want, as plain messages."""
    async with Client(f"kiteq://{broker}", group="shop", topics=["shop"]) as client:
        for _ in range(count):
            want = {"customer": random.choice(list(OrderService.accounts)), "amount": random.randint(5, 25)}
            await client.send(Message("shop", "wanted", json.dumps(want)))
    print(f"shop: {count} orders sent")


def audit(orders: Database, payments: Database) -> int:
    """Print the balances, and return 0 if they agree, 1 if not."""
    for service, database in ((OrderService, orders), (PaymentService, payments)):
        database.create(service.table, service.accounts)
    books = read_books(orders, payments)
    faults = books.faults()
    print(books.balances(), *faults, "DISAGREE" if faults else "agree", sep="\n")
    return 1 if faults else 0


def main() -> int:
    arguments = parse()
    orders = Database("orders", arguments.folder, arguments.mariadb)
    payments = Database("payments", arguments.folder, arguments.mariadb)
    try:
        if arguments.command == "order-service":
            asyncio.run(OrderService(orders, arguments.crash_at).run(arguments.broker))
        elif arguments.command == "payment-service":
            asyncio.run(PaymentService(payments, arguments.crash_at).run(arguments.broker))
        elif arguments.command == "shop":
            asyncio.run(shop(arguments.broker, arguments.orders))
        else:
            return audit(orders, payments)
    except NotConnected as error:
        print(f"is a broker running? {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
