"""The marker as `on_check=` of the real clients, with a real broker."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import anyio
import pytest
import trio

from kiteq_client import Client, Message, Outcome, blocking, direct
from kiteq_client.decision import Decision
from kiteq_client.marker import AlreadyRolledBack, Marker, StillInTransaction
from tests.marker.databases import SqliteDatabase, set_up
from tests.support.broker import BrokerProcess

pytestmark = pytest.mark.slow

ANSWER_SECONDS_MAX = 20.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    set_up(SqliteDatabase(tmp_path / "shop.db"))
    return tmp_path / "shop.db"


def kinds(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT id, kind FROM kiteq_marker"))


async def test_what_the_database_says_is_what_is_delivered(path: Path, broker: BrokerProcess) -> None:
    marker = Marker(partial(sqlite3.connect, path), lock_timeout=0)
    shop = sqlite3.connect(path)
    async with Client(
        f"kiteq://{broker.address}", group="shop", topics=["trade"], bindings=[direct("trade", "paid")], on_check=marker
    ) as client:
        async with client.transaction(Message("trade", "paid", "committed")) as committed:
            marker.mark(shop, committed)
            shop.commit()
        async with client.transaction(Message("trade", "paid", "rolled back")) as rolled_back:
            marker.mark(shop, rolled_back)
            shop.rollback()
        with pytest.raises(KeyError):
            async with client.transaction(Message("trade", "paid", "raised after the commit")) as raised:
                marker.mark(shop, raised)
                shop.commit()
                raise KeyError
        with pytest.raises(KeyError):
            async with client.transaction(Message("trade", "paid", "raised before")):
                raise KeyError
        with pytest.raises(StillInTransaction):
            async with client.transaction(Message("trade", "paid", "left open"), check_after=1) as left_open:
                marker.mark(shop, left_open)
        assert [tx.outcome for tx in (committed, rolled_back, raised, left_open)] == [
            Outcome.COMMITTED, Outcome.ROLLED_BACK, Outcome.COMMITTED, Outcome.UNKNOWN,
        ]  # fmt: skip
        shop.commit()
        with anyio.fail_after(ANSWER_SECONDS_MAX):
            # The last one comes when the broker has asked for it.
            texts: list[str] = []
            async for delivery in client.deliveries():
                await delivery.ack()
                texts.append(delivery.text)
                if "left open" in texts:
                    break
            # Markers go once the broker has the decision on disk.
            while committed.id.hex() in kinds(path):  # noqa: ASYNC110 the event is in the database
                await trio.sleep(0.02)
        assert sorted(texts) == ["committed", "left open", "raised after the commit"]
    shop.close()
    await marker.aclose()


def test_the_blocking_client_takes_the_marker_too(path: Path, broker: BrokerProcess) -> None:
    marker = Marker(partial(sqlite3.connect, path), lock_timeout=0)
    with (
        closing(sqlite3.connect(path)) as shop,
        blocking.Client(f"kiteq://{broker.address}", group="shop", topics=["trade"], on_check=marker) as client,
    ):
        with client.transaction(Message("trade", "paid", "committed")) as committed:
            marker.mark(shop, committed)
            shop.commit()
        with client.transaction(Message("trade", "paid", "rolled back")) as rolled_back:
            marker.mark(shop, rolled_back)
            shop.rollback()
        with pytest.raises(AlreadyRolledBack), client.transaction(Message("trade", "paid", "late")) as late:
            assert marker.check_id(late.id) is Decision.ROLLBACK
            marker.mark(shop, late)
    assert [tx.outcome for tx in (committed, rolled_back, late)] == [
        Outcome.COMMITTED, Outcome.ROLLED_BACK, Outcome.ROLLED_BACK,
    ]  # fmt: skip
    marker.close()
