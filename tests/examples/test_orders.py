"""The demo: whichever service dies at whichever step, after its restart all orders are paid, and once."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from examples.orders.__main__ import audit
from examples.orders.audit import read_books
from examples.orders.database import Database
from examples.orders.steps import STEPS
from tests.examples.programs import Program, Stage, until
from tests.support.mariadb import MariaDB

pytestmark = pytest.mark.slow

ORDERS: Final = 3
OTHER: Final = {"order-service": "payment-service", "payment-service": "order-service"}
CHECKED: Final = {
    "after-prepare": "rollback",
    "in-local-transaction": "rollback",
    "after-local-commit": "commit",
    "before-commit-sent": "commit",
    "during-check": "commit",
}
"""What the check after the restart finds; the other steps leave nothing undecided."""


class Demo:
    """The commands of the demo on one pair of databases."""

    def __init__(self, stage: Stage, mariadb: str | None = None) -> None:
        self.stage = stage
        self.flags = () if mariadb is None else ("--mariadb", mariadb)
        self._databases = [Database(name, stage.folder / "kiteq-demo", mariadb) for name in ("orders", "payments")]

    def service(self, name: str, *flags: str) -> Program:
        return self.stage.start("-m", "examples.orders", name, *self.flags, *flags)

    def shop(self, orders: int = ORDERS) -> None:
        status, output = self.stage.run("-m", "examples.orders", "shop", "--orders", str(orders), *self.flags)
        assert (status, output) == (0, f"shop: {orders} orders sent\n")

    def audit(self) -> tuple[int, str]:
        return self.stage.run("-m", "examples.orders", "audit", *self.flags)

    def agrees(self) -> str:
        status, output = self.audit()
        assert status == 0, output
        assert output.endswith("together         900 of 900\nagree\n")
        return output

    def wait_all_paid(self, *running: Program) -> None:
        def all_paid() -> bool:
            books = read_books(*self._databases)
            assert books.faults() == []
            return len(books.closed) == ORDERS

        until(all_paid, lambda: "\n".join([self.agrees(), *(one.output for one in running)]))
        assert re.search(rf"{ORDERS} of {ORDERS} orders closed\n.* from {ORDERS} payments\n", self.agrees())


def crash_and_restart(demo: Demo, service: str, step: str) -> None:
    other = demo.service(OTHER[service])
    crashing = demo.service(service, "--crash-at", "after-local-commit" if step == "during-check" else step)
    demo.shop()
    crashing.wait_killed()
    demo.agrees()
    if step == "during-check":
        crashing = demo.service(service, "--crash-at", step)
        crashing.wait_killed()
    assert f"CRASH here, at {step}: {STEPS[step]}" in crashing.output.splitlines()[-1]

    again = demo.service(service)
    demo.wait_all_paid(again, other)
    if step in CHECKED:
        again.wait_for("the broker asks about ")
        # More than one, if the service had gone on after the restart in which it died during the check.
        answers = re.findall(r"the broker asks about \"\w+\" of order \w{6}: (\w+)", again.output)
        assert CHECKED[step] in answers
    again.stop()
    other.stop()
    assert "Traceback" not in again.output + other.output


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("service", OTHER)
def test_the_money_agrees_after_a_crash(stage: Stage, service: str, step: str) -> None:
    crash_and_restart(Demo(stage), service, step)


def test_the_money_agrees_after_a_crash_with_mariadb(stage: Stage) -> None:
    with MariaDB() as server:
        demo = Demo(stage, f"mysql://kiteq:@{server.host}:{server.port}")
        crash_and_restart(demo, "payment-service", "after-local-commit")


def test_an_order_that_is_too_dear_is_rolled_back_and_not_paid(stage: Stage) -> None:
    demo = Demo(stage)
    orders = demo.service("order-service")
    payments = demo.service("payment-service")
    orders.wait_for("ready")
    with closing(sqlite3.connect(stage.folder / "kiteq-demo" / "orders.db")) as database, database:
        database.execute("UPDATE accounts SET balance = 0")
    demo.shop(1)
    orders.wait_for("has not enough money")
    assert 'message "placed" rolled back' in orders.output
    status, output = demo.audit()  # money has vanished: we took it
    assert (status, output.splitlines()[-1]) == (1, "DISAGREE")
    assert "0 of 0 orders" in output
    payments.stop()
    assert "payment of" not in payments.output
    orders.stop()


@pytest.mark.parametrize(
    ("database", "damage", "fault"),
    [
        ("payments", "INSERT INTO payments VALUES ('b', 'abcdef', 7)", "a payment of 7 for order abcdef"),
        ("payments", "INSERT INTO payments SELECT 'b', order_id, amount FROM payments", "is paid 2 times"),
        ("payments", "DELETE FROM payments", "is closed, and not paid"),
        ("payments", "UPDATE accounts SET balance = balance + 1", "the till is not the sum of the payments"),
        ("orders", "UPDATE accounts SET balance = balance + 1", "is not what they had"),
        ("orders", "DELETE FROM orders", "ordered for nothing"),
    ],
)
def test_the_audit_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], database: str, damage: str, fault: str
) -> None:
    databases = {name: Database(name, tmp_path, None) for name in ("orders", "payments")}

    def execute(name: str, *statements: str) -> None:
        with databases[name].transaction() as transaction:
            for statement in statements:
                transaction.run(statement)

    assert audit(**databases) == 0
    execute(
        "orders",
        "INSERT INTO orders VALUES ('0123456789', 'anna', 20, 'paid')",
        "UPDATE accounts SET balance = 280 WHERE name = 'anna'",
    )
    execute("payments", "INSERT INTO payments VALUES ('a', '0123456789', 20)", "UPDATE accounts SET balance = 20")
    assert audit(**databases) == 0
    assert capsys.readouterr().out.endswith("together         900 of 900\nagree\n")
    execute(database, damage)
    assert audit(**databases) == 1
    output = capsys.readouterr().out
    assert output.endswith("\nDISAGREE\n")
    assert fault in output
