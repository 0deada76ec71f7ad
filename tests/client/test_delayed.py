"""Delayed messages as a program sees them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from kiteq_client import Client, Message, PartlySent, Received, Refused, direct
from tests.client.test_with_broker import served


async def test_a_delayed_message_is_stored_for_groups_that_are_not_known_yet(tmp_path: Path) -> None:
    got: list[Received] = []
    came = trio.Event()

    async def handle(message: Received) -> None:
        got.append(message)
        if len(got) == 3:
            came.set()

    async with (
        served(tmp_path) as address,
        Client(address, group="g", bindings=[direct("trade", "pay")], on_message=handle),
        Client(address, group="shop", topics=["trade"]) as shop,
    ):
        moment = datetime.now(UTC) + timedelta(seconds=0.1)
        messages = [
            Message("trade", "pay", "in time", delay=0.2),
            Message("trade", "pay", "then", deliver_at=moment),
            Message("trade", "pay", "now"),
        ]
        receipts = await shop.send_many(messages)
        assert [(one.groups, one.duplicate, one.durable) for one in receipts] == [
            (None, False, True), (None, False, True), (1, False, True),
        ]  # fmt: skip
        assert (await shop.send(messages[0])).duplicate
        with trio.fail_after(5):
            await came.wait()
    assert [one.text for one in got] == ["now", "then", "in time"]
    assert [one.delay for one in got] == [None, None, 0.2]
    assert got[1].deliver_at == pytest.approx(moment.timestamp(), abs=0.001)
    assert got[1].deliver_at is not None
    assert got[1].deliver_at >= moment.timestamp()


async def test_a_fly_message_with_a_delay_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with served(tmp_path) as address, Client(address, group="shop") as shop:
        with pytest.raises(ValueError, match="neither delay nor key"):
            await shop.send(Message("trade", "pay", fly=True, delay=1))
        with pytest.raises((ValueError, Refused, PartlySent), match="delay must be 0 to 31622400 seconds"):
            await shop.send(Message("trade", "pay", delay=32_000_000))
