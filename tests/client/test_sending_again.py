"""The same message sent a second time, with several brokers: to the one that was given it, and so can know it again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from kiteq.remoting.packets import Packet, Publish
from kiteq_client import Client, Message, Receipt, Refused, direct
from tests.client.ledger import Ledger, until
from tests.client.peer import Connection, both_loops, peer
from tests.support.broker import BrokerProcess


def message(body: str = "x") -> Message:
    return Message("trade", "pay", body)


def is_publish(packet: Packet) -> bool:
    return isinstance(packet, Publish)


@both_loops
async def test_a_message_that_is_sent_again_goes_to_the_broker_that_was_given_it() -> None:
    one, two = Ledger("b1"), Ledger("b2")
    async with (
        peer(one.script) as first,
        peer(two.script) as second,
        Client(f"kiteq://{first},{second}", group="g") as client,
    ):
        messages = [message(str(number)) for number in range(20)]
        before = [(await client.send(each)).broker for each in messages]
        assert set(before) == {"b1", "b2"}
        assert [(await client.send(each)).broker for each in messages] == before
        mixed = await client.send_many([sent for each in messages for sent in (message("new"), each)])
        assert [receipt.broker for receipt in mixed[1::2]] == before
        assert [receipt.message_id for receipt in mixed[1::2]] == [each.id for each in messages]


@both_loops
async def test_a_message_that_is_sent_again_goes_to_another_broker_when_the_first_is_gone() -> None:
    ledgers = {"b1": Ledger("b1"), "b2": Ledger("b2")}

    async def gone(_connection: Connection) -> None:
        return

    async with (
        peer(ledgers["b1"].script, gone) as first,
        peer(ledgers["b2"].script, gone) as second,
        Client(f"kiteq://{first},{second}", group="g") as client,
    ):
        sent = message()
        had = (await client.send(sent)).broker
        await ledgers[had].connections[0].stream.aclose()
        await until(lambda: len(client.statistics().connected) == 1)
        assert (await client.send(sent)).broker != had


@both_loops
async def test_what_a_broker_has_refused_may_go_to_another_one() -> None:
    """A full broker would otherwise be given it again and again."""
    ledgers = {"b1": Ledger("b1"), "b2": Ledger("b2")}
    async with (
        peer(ledgers["b1"].script) as first,
        peer(ledgers["b2"].script) as second,
        Client(f"kiteq://{first},{second}", group="g") as client,
    ):
        for full in ledgers.values():
            full.refuse = lambda packet: ("store_full", True) if is_publish(packet) else None
        sent = message()
        with pytest.raises(Refused, match="the script says so"):
            await client.send(sent)
        assert sent.given_to == ""
        [refused] = [ledger for ledger in ledgers.values() if ledger.packets(Publish)]
        for ledger in ledgers.values():
            if ledger is not refused:
                ledger.refuse = lambda _packet: None
        receipt: Receipt | None = None
        while receipt is None:
            with suppress(Refused):
                receipt = await client.send(sent)
        assert receipt.broker != refused.broker


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_brokers_know_a_message_again(loop: str, tmp_path: Path) -> None:
    async def use(brokers: str) -> None:
        async with Client(brokers, group="g", bindings=[direct("trade", "pay")]) as client:
            await until(lambda: len(client.statistics().connected) == 2)
            messages = [message() for _ in range(10)]
            receipts = [await client.send(each) for each in messages]
            assert not any(receipt.duplicate for receipt in receipts)
            assert len({receipt.broker for receipt in receipts}) == 2
            assert all([(await client.send(each)).duplicate for each in messages])
            assert all(receipt.duplicate for receipt in await client.send_many(messages))

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with BrokerProcess(tmp_path / "one") as one, BrokerProcess(tmp_path / "two") as two:
        anyio.run(use, f"kiteq://{one.address},{two.address}", backend=loop)
