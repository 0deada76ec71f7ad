"""Stores of other releases: an earlier one is upgraded in place and loses nothing, a later one is refused untouched.

`stores/formatN.json` has the rows that a broker of format N left behind when it was drained; `sample.py` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from kiteq.binding.bindings import fanout, regex
from kiteq.message import Message
from kiteq.store.lmdb import LmdbTables
from kiteq.store.recovery import FORMAT_VERSION, FORMATS_READ
from kiteq.store.tables import Table
from tests.cli.running import refused
from tests.e2e.wire import JumpingClock, Refused, connect, running
from tests.versions.sample import BYTES_MAX, END, HOUR_S, STORES, id_of

pytestmark = pytest.mark.slow

NUMBERS: Final = [number for number in FORMATS_READ if (STORES / f"format{number}.json").exists()]


def sample(number: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((STORES / f"format{number}.json").read_text())
    return content


def write_store(folder: Path, number: int) -> None:
    """Make a store of an earlier format."""
    tables = LmdbTables(folder, BYTES_MAX)
    rows = sample(number)["rows"]
    tables.apply([(Table(table), bytes.fromhex(key), bytes.fromhex(value)) for table, key, value in rows])
    tables.close()


def rows_of(folder: Path) -> dict[tuple[Table, bytes], bytes]:
    tables = LmdbTables(folder, BYTES_MAX)
    rows = {(table, key): value for table in Table for key, value in tables.scan(table, b"", END)}
    tables.close()
    return rows


class ClockOf(JumpingClock):
    """The present, if it were so many seconds after the earlier broker had ended."""

    def __init__(self, number: int, after_s: int) -> None:
        super().__init__()
        self.ahead_s = (sample(number)["written_ms"] - super().epoch_ms()) / 1000 + after_s


def test_there_is_a_sample_of_every_earlier_format() -> None:
    earlier = [number for number in FORMATS_READ if number != FORMAT_VERSION]
    assert earlier
    assert [number for number in earlier if not (STORES / f"format{number}.json").exists()] == []


@pytest.mark.parametrize("number", NUMBERS)
async def test_an_earlier_store_keeps_what_every_group_is_owed(tmp_path: Path, number: int) -> None:
    write_store(tmp_path, number)
    # members had acked orders 0 and 1; audit was away. Since format 2 a transaction was committed behind the orders.
    orders = [b"order %d" % order for order in range(5)] + ([b"committed"] if number >= 2 else [])
    async with running(tmp_path, ClockOf(number, 10)) as broker:
        members = await connect(broker, "members", window=100)
        got = await members.take(len(orders) - 2)
        assert [(delivery.body, delivery.attempt) for delivery in got] == [(order, 1) for order in orders[2:]]
        audit = await connect(broker, "audit", window=100)
        assert [delivery.body for delivery in await audit.take(len(orders))] == orders
        # A send is a repeat still, and bindings are what they were.
        repeat = Message("trade", "pay-succ", "order 0", id=id_of(number, 0), properties={"n": "0"})
        assert (await members.publish([repeat])).exceptions[0][1] == "duplicate"
        assert (await members.publish([Message("trade", "pay-fail", b"")])).groups == 1
        assert (await members.publish([Message("trade", "pay-succ", b"")])).groups == 2
        with pytest.raises(Refused, match="watermark"):
            await connect(broker, "audit", regex("trade", "other", watermark=7))
        late = await connect(broker, "late", fanout("trade", start="first"), window=1)
        assert [delivery.body for delivery in await late.take(1)] == [b"kept apart"]
    assert rows_of(tmp_path)[Table.META, b"format"] == b"%d" % FORMAT_VERSION


@pytest.mark.parametrize("number", NUMBERS)
async def test_an_earlier_store_keeps_what_waits_and_what_failed(tmp_path: Path, number: int) -> None:
    write_store(tmp_path, number)
    async with running(tmp_path, ClockOf(number, HOUR_S)) as broker:
        feeders = await connect(broker, "feeders", window=1)
        [later] = await feeders.take(1)
        assert (later.body, later.attempt) == (b"later", 2)
        [dead] = await feeders.admin("dlq.list", group="feeders")
        assert (dead["message_type"], dead["error"]) == ("reject", "cannot be handled")
        if number >= 2:
            members = await connect(broker, "members", window=100)
            before = [b"order 2", b"order 3", b"order 4", b"committed"]
            assert sorted(delivery.body for delivery in await members.take(5)) == sorted([*before, b"delayed"])
            shop = await connect(broker, "shop", topics=["trade"])
            assert await shop.commit(id_of(number, 20)) == []
            assert [delivery.body for delivery in await members.take(1)] == [b"undecided"]
            [[_, code, *_]] = await shop.commit(id_of(number, 22))
            assert code == "transaction_conflict"


def test_a_store_of_a_later_format_is_refused_and_not_changed(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    write_store(folder, NUMBERS[-1])
    tables = LmdbTables(folder, BYTES_MAX)
    tables.apply([(Table.META, b"format", b"%d" % (FORMAT_VERSION + 1))])
    tables.close()
    before = rows_of(folder)
    sentence = refused(tmp_path, "--bind", "127.0.0.1:0", "--db", f"lmdb://{folder}", status=1)
    assert sentence == (
        f"the store has format {FORMAT_VERSION + 1}, this kiteq reads format {FORMAT_VERSION}: upgrade kiteq"
    )
    assert rows_of(folder) == before
