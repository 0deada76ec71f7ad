"""What the README says of the examples: its commands are taken, and what it shows is what is printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Final

import pytest

from examples.orders.__main__ import parse
from examples.orders.steps import STEPS
from tests.examples.programs import ROOT, Stage

README: Final = (ROOT / "README.md").read_text()
PYTHON: Final = ".venv/bin/python "


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(title: str) -> Iterator[list[str]]:
    """Yield the words after `python` of each command of a section."""
    for block in blocks(section(title), "sh"):
        for line in block.splitlines():
            if line.startswith(PYTHON):
                yield shlex.split(line)[1:]


def shape(text: str) -> list[str]:
    """Return the lines without what differs from run to run."""
    text = re.sub(r"\border [0-9a-f]{6}\b", "order ID", text)
    text = re.sub(r"\b(anna|ben|clara)\b", "NAME", text)
    return re.sub(r"\d+(:\d\d:\d\d)?", "N", text).splitlines()


def test_the_commands_of_the_demo_are_taken() -> None:
    assert [parse(words[2:]).command for words in commands("The demo")] == [
        "order-service", "payment-service", "shop", "audit", "payment-service"
    ]  # fmt: skip


def test_every_step_is_named() -> None:
    assert all(f"`{step}`" in section("The demo") for step in STEPS)


@pytest.mark.slow
def test_the_demo_prints_what_is_shown(stage: Stage) -> None:
    orders, payments, shop, audit, again = commands("The demo")
    crashed, first_audit, restarted, last_audit = map(shape, blocks(section("The demo"), "text"))

    running = stage.start(*orders)
    crashing = stage.start(*payments)
    assert stage.run(*shop)[0] == 0
    crashing.wait_killed()
    assert shape(crashing.output) == crashed
    running.wait_for("order-service: message")
    status, output = stage.run(*audit)
    assert status == 0
    assert shape(output) == first_audit

    service = stage.start(*again)
    service.wait_for("the broker asks about")
    service.wait_for("is booked already")
    service.wait_for('message "paid" committed')
    assert sorted(shape(service.output)) == sorted(restarted)  # the check comes when its time has come
    running.wait_for("is paid and closed")
    assert len(shape(stage.run(*audit)[1])) == len(last_audit)


@pytest.mark.slow
def test_the_transaction_prints_what_is_shown(stage: Stage) -> None:
    crash, answer = (words for words in commands("Transactions"))
    crashed, answered = blocks(section("Transactions"), "text")
    crashing = stage.start(str(ROOT / crash[0]), *crash[1:])
    crashing.wait_killed()
    assert crashing.output == crashed
    answering = stage.start(str(ROOT / answer[0]), *answer[1:])
    answering.wait_for("the broker asks")
    assert answering.output == answered
