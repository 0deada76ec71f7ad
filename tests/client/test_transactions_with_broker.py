"""Transactions of the client and a real broker, with a database file of the user's own between them."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path

import anyio
import pytest
import trio

from kiteq.broker import serve
from kiteq.config import Settings
from kiteq_client import (
    Client,
    Decision,
    Message,
    Outcome,
    Received,
    Refused,
    TransactionConflict,
    UnknownTransaction,
    direct,
    fanout,
)
from tests.client.parts import OwnError
from tests.support.broker import DISK_FREE_MIN, BrokerProcess, free_port


@asynccontextmanager
async def served(folder: Path, bind: str = "127.0.0.1:0", **settings: object) -> AsyncIterator[str]:
    made = Settings(bind=bind, db=f"lmdb://{folder}/store", disk_free_min=DISK_FREE_MIN, **settings)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        broker = await nursery.start(partial(serve, made))
        yield broker.address
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(8):
        while not condition():  # noqa: ASYNC110 what the test waits for happens in a handler
            await trio.sleep(0.002)


class Orders:
    """The user's database, and a check function that is right because its table says each outcome."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "orders.db"
        with closing(self.connect()) as database:
            database.execute("CREATE TABLE orders (id BLOB PRIMARY KEY, state TEXT)")
            database.commit()

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path)

    def insert(self, key: bytes, state: str = "paid") -> None:
        with closing(self.connect()) as database:
            database.execute("INSERT INTO orders VALUES (?, ?)", (key, state))
            database.commit()

    def state(self, key: bytes) -> str | None:
        with closing(self.connect()) as database:
            row = database.execute("SELECT state FROM orders WHERE id = ?", (key,)).fetchone()
            return None if row is None else row[0]

    async def check(self, message: Received) -> Decision:
        state = self.state(message.id)
        return {"paid": Decision.COMMIT, "given up": Decision.ROLLBACK, None: Decision.UNKNOWN}[state]


class Shelf:
    """A handler that keeps what it got."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    async def __call__(self, message: Received) -> None:
        self.got.append(message.body)


async def test_what_is_committed_is_delivered_and_nothing_before(tmp_path: Path) -> None:
    shelf = Shelf()
    async with (
        served(tmp_path) as address,
        Client(address, group="members", bindings=[fanout("trade"), fanout("feed")], on_message=shelf),
        Client(address, group="shop", topics=["trade", "feed"]) as shop,
    ):
        async with shop.transaction(Message("trade", "pay", b"1"), Message("feed", "pay", b"2")) as tx:
            await tx.add(Message("trade", "pay", b"3"))
            await shop.send(Message("trade", "pay", b"plain"))
            await until(lambda: shelf.got == [b"plain"])
        assert tx.outcome is Outcome.COMMITTED
        await until(lambda: len(shelf.got) == 4)
        assert sorted(shelf.got[1:]) == [b"1", b"2", b"3"]
        async with shop.transaction(Message("trade", "pay", b"never")) as tx:
            await tx.rollback()
        await shop.send(Message("trade", "pay", b"last"))
        await until(lambda: b"last" in shelf.got)
        assert b"never" not in shelf.got


async def test_a_large_transaction_is_delivered_whole_and_in_order(tmp_path: Path) -> None:
    shelf = Shelf()
    bodies = [b"%03d" % number + bytes(100_000 * (number % 7 == 0)) for number in range(300)]
    async with (
        served(tmp_path) as address,
        Client(address, group="members", bindings=[direct("trade", "pay")], on_message=shelf),
        Client(address, group="shop", topics=["trade"]) as shop,
    ):
        async with shop.transaction(*(Message("trade", "pay", body) for body in bodies)):
            pass
        await until(lambda: len(shelf.got) == len(bodies))
        assert shelf.got == bodies


async def test_an_exception_after_the_database_commit_still_ends_in_delivery(tmp_path: Path) -> None:
    shelf, orders = Shelf(), Orders(tmp_path)
    async with (
        served(tmp_path, check_after=60.0) as address,
        Client(address, group="members", bindings=[fanout("trade")], on_message=shelf),
        Client(address, group="shop", topics=["trade"], on_check=orders.check) as shop,
    ):
        paid = Message("trade", "pay", b"paid")
        error = OwnError("sending the mail failed")
        with pytest.raises(OwnError) as caught:
            async with shop.transaction(paid) as tx:
                orders.insert(paid.id)
                raise error
        assert caught.value is error
        assert tx.outcome is Outcome.COMMITTED
        await until(lambda: shelf.got == [b"paid"])
        refused = Message("trade", "pay", b"given up")
        with pytest.raises(OwnError):
            async with shop.transaction(refused) as tx:
                orders.insert(refused.id, "given up")
                raise error
        assert tx.outcome is Outcome.ROLLED_BACK
        await shop.send(Message("trade", "pay", b"last"))
        await until(lambda: shelf.got == [b"paid", b"last"])


async def test_what_the_check_function_does_not_know_yet_is_asked_about_again(tmp_path: Path) -> None:
    shelf, orders = Shelf(), Orders(tmp_path)
    async with (
        served(tmp_path, check_after=0.1) as address,
        Client(address, group="members", bindings=[fanout("trade")], on_message=shelf),
        Client(address, group="shop", topics=["trade"], on_check=orders.check) as shop,
    ):
        late = Message("trade", "pay", b"late")
        with pytest.raises(OwnError):
            async with shop.transaction(late) as tx:
                raise OwnError
        assert tx.outcome is Outcome.UNKNOWN
        await until(lambda: shop.statistics().checks["unknown"])
        orders.insert(late.id)
        await until(lambda: shelf.got == [b"late"])


async def test_a_block_that_takes_long_is_running(tmp_path: Path) -> None:
    shelf, orders = Shelf(), Orders(tmp_path)
    async with (
        served(tmp_path) as address,
        Client(address, group="members", bindings=[fanout("trade")], on_message=shelf),
        Client(address, group="shop", topics=["trade"], on_check=orders.check) as shop,
    ):
        async with shop.transaction(Message("trade", "pay", b"slow"), check_after=0.1):
            await until(lambda: shop.statistics().checks["running"])
            assert not shelf.got
        await until(lambda: shelf.got == [b"slow"])
        assert shop.statistics().checks["unknown"] == 0


async def test_another_process_of_the_group_answers_for_one_that_is_gone(tmp_path: Path) -> None:
    shelf, orders = Shelf(), Orders(tmp_path)
    paid = Message("trade", "pay", b"paid")
    async with (
        served(tmp_path, check_elsewhere_after=0.1) as address,
        Client(address, group="members", bindings=[fanout("trade")], on_message=shelf),
    ):
        shop = Client(address, group="shop", topics=["trade"])
        with anyio.CancelScope() as crash:
            async with shop, shop.transaction(paid, check_after=0.1):
                orders.insert(paid.id)
                crash.cancel()
                await trio.sleep_forever()
        await trio.sleep(0.02)
        assert not shelf.got
        async with Client(address, group="shop", topics=["trade"], on_check=orders.check):
            await until(lambda: shelf.got == [b"paid"])


async def test_only_the_group_decides_and_the_first_decision_is_final(tmp_path: Path) -> None:
    async with (
        served(tmp_path) as address,
        Client(address, group="shop", topics=["trade"]) as shop,
        Client(address, group="shop", topics=["trade"]) as other,
        Client(address, group="stranger", topics=["trade"]) as stranger,
    ):
        prepared = await shop.prepare(Message("trade", "pay"))
        with pytest.raises(UnknownTransaction):
            await stranger.commit(prepared)
        await other.commit(prepared.id.hex())
        await shop.commit(prepared)
        with pytest.raises(TransactionConflict, match="committed before"):
            await shop.rollback(prepared)
        with pytest.raises(TransactionConflict, match="your local transaction stands"):
            async with shop.transaction(Message("trade", "pay")) as tx:
                await other.rollback(tx.id)
        with pytest.raises(UnknownTransaction):
            await shop.commit(bytes(16))


async def test_a_topic_the_broker_does_not_serve_refuses_all_of_it(tmp_path: Path) -> None:
    async with (
        served(tmp_path, topics=("trade",)) as address,
        Client(address, group="shop", topics=["trade"]) as shop,
    ):
        with pytest.raises(Refused) as caught:
            async with shop.transaction(Message("trade", "pay"), Message("feed", "pay")):
                raise AssertionError
        assert caught.value.code == "topic_not_served"
        async with shop.transaction(Message("trade", "pay")) as tx:
            with pytest.raises(Refused):
                await tx.add(Message("feed", "pay"))
        assert tx.outcome is Outcome.COMMITTED
        assert await shop.admin("tx.list") == []


async def test_a_restart_of_the_broker_inside_the_block_is_a_pause(tmp_path: Path) -> None:
    shelf = Shelf()
    address = f"127.0.0.1:{free_port()}"
    async with (
        Client(address, group="members", bindings=[fanout("trade")], on_message=shelf, wait=False) as members,
        Client(address, group="shop", topics=["trade"], wait=False) as shop,
    ):
        async with served(tmp_path, address):
            await until(lambda: members.statistics().connected)
            tx = await shop.transaction(Message("trade", "pay", b"1")).__aenter__()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tx.add, Message("trade", "pay", b"2"))
            await trio.sleep(0.02)
            async with served(tmp_path, address):
                while tx._transactions.placing.is_waiting:  # noqa: ASYNC110 the addition runs in another task
                    await trio.sleep(0.002)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tx.__aexit__, None, None, None)
            await trio.sleep(0.02)
            async with served(tmp_path, address):
                await until(lambda: tx.outcome is Outcome.COMMITTED)
                await until(lambda: shelf.got == [b"1", b"2"])


@pytest.mark.slow
async def test_a_killed_broker_keeps_what_a_block_was_told(tmp_path: Path) -> None:
    shelf = Shelf()
    async with BrokerProcess(tmp_path) as broker:
        async with (
            Client(broker.address, group="members", bindings=[fanout("trade")], on_message=shelf),
            Client(broker.address, group="shop", topics=["trade"], timeout=20) as shop,
        ):
            prepared = [await shop.prepare(Message("trade", "pay", b"%d" % number)) for number in range(20)]
            for one in prepared[:10]:
                await shop.commit(one)
            broker.kill()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, broker.start)
                for one in prepared[10:15]:
                    nursery.start_soon(shop.commit, one)
                for one in prepared[15:]:
                    nursery.start_soon(shop.rollback, one)
            for one in prepared[:15]:
                await shop.commit(one)
            await until(lambda: len(set(shelf.got)) == 15)
        assert set(shelf.got) == {b"%d" % number for number in range(15)}


async def test_many_tasks_share_commits_and_each_is_delivered_once(tmp_path: Path) -> None:
    shelf = Shelf()
    async with (
        served(tmp_path) as address,
        Client(address, group="members", bindings=[fanout("trade")], on_message=shelf),
        Client(address, group="shop", topics=["trade"]) as shop,
    ):

        async def transact(first: int) -> None:
            for number in range(first, first + 10):
                async with shop.transaction(Message("trade", "pay", b"%d" % number)) as tx:
                    if number % 5 == 0:
                        await tx.rollback()

        async with trio.open_nursery() as nursery:
            for first in range(0, 640, 10):
                nursery.start_soon(transact, first)
        await until(lambda: len(shelf.got) == 512)
        statistics = shop.statistics()
        assert (statistics.committed, statistics.rolled_back, statistics.pending_decisions) == (512, 128, 0)
    assert sorted(shelf.got) == sorted(b"%d" % number for number in range(640) if number % 5)
