"""The demo: whichever service dies at whichever step, after its restart all orders are paid, and once."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from typing import Final

import pytest

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

    def __init__(self, stage: Stage, *flags: str) -> None:
        self.stage = stage
        self.flags = flags

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
        done = f"{ORDERS} of {ORDERS} orders closed"
        until(lambda: done in self.agrees(), lambda: "\n".join([self.agrees(), *(one.output for one in running)]))
        assert f"from {ORDERS} payments" in self.agrees()


def crash_and_restart(demo: Demo, service: str, step: str) -> None:
    other = demo.service(OTHER[service])
    crashing = demo.service(service, "--crash-at", "after-local-commit" if step == "during-check" else step)
    demo.shop()
    crashing.wait_killed()
    demo.agrees()
    if step == "during-check":
        crashing = demo.service(service, "--crash-at", step)
        crashing.wait_killed()
        demo.agrees()
    assert f"CRASH here, at {step}: {STEPS[step]}" in crashing.output.splitlines()[-1]

    again = demo.service(service)
    demo.wait_all_paid(again, other)
    if step in CHECKED:
        again.wait_for("the broker asks about ")
        [answer] = re.findall(r"the broker asks about \"\w+\" of order \w{6}: (\w+)", again.output)
        assert answer == CHECKED[step]
    again.stop()
    other.stop()
    assert "Traceback" not in again.output + other.output


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("service", OTHER)
def test_the_money_agrees_after_a_crash(stage: Stage, service: str, step: str) -> None:
    crash_and_restart(Demo(stage), service, step)


@pytest.mark.parametrize(
    ("service", "step"), [("order-service", "in-local-transaction"), ("payment-service", "after-local-commit")]
)
def test_the_money_agrees_after_a_crash_with_mariadb(stage: Stage, service: str, step: str) -> None:
    with MariaDB() as server:
        crash_and_restart(Demo(stage, "--mariadb", f"mysql://kiteq:@{server.host}:{server.port}"), service, step)


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
def test_the_audit_finds(stage: Stage, database: str, damage: str, fault: str) -> None:
    demo = Demo(stage)
    demo.agrees()
    paid = {
        "orders": [
            "INSERT INTO orders VALUES ('0123456789', 'anna', 20, 'paid')",
            "UPDATE accounts SET balance = 280 WHERE name = 'anna'",
        ],
        "payments": ["INSERT INTO payments VALUES ('a', '0123456789', 20)", "UPDATE accounts SET balance = 20"],
    }
    for name, statements in paid.items():
        execute(stage, name, *statements)
    assert "1 of 1 orders closed" in demo.agrees()
    execute(stage, database, damage)
    status, output = demo.audit()
    assert (status, output.splitlines()[-1]) == (1, "DISAGREE")
    assert fault in output


def execute(stage: Stage, database: str, *statements: str) -> None:
    with closing(sqlite3.connect(stage.folder / "kiteq-demo" / f"{database}.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)
