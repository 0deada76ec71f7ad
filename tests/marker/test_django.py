"""Django: the transaction of a request, atomic blocks, and its test client."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from django.db import connections, transaction
from django.db.transaction import TransactionManagementError
from django.test import Client as Browser

from kiteq_client import Message, Outcome
from kiteq_client.blocking import Client
from kiteq_client.decision import Decision
from kiteq_client.marker import AlreadyRolledBack, MarkRefused
from tests.marker import django_project
from tests.marker.django_project import ALIASES, Shop, count, insert
from tests.marker.schedule import Broker, FakeTransaction
from tests.marker.test_dbapi import AsyncTransaction
from tests.support.broker import BrokerProcess
from tests.support.mariadb import MariaDB
from tests.support.postgres import PostgreSQL


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, mariadb: MariaDB, postgres: PostgreSQL) -> Iterator[None]:
    django_project.set_up(tmp_path_factory.mktemp("django"), mariadb, postgres)
    yield
    connections.close_all()


@pytest.fixture(params=ALIASES)
def shop(project: None, request: pytest.FixtureRequest) -> Iterator[Shop]:
    shop = django_project.shop
    shop.__init__(request.param)  # type: ignore[misc]  # one object, because the views know it
    yield shop
    shop.marker.close()
    connections.close_all()


@pytest.fixture
def browser() -> Browser:
    return Browser(raise_request_exception=False)


@pytest.fixture
def tx() -> FakeTransaction:
    return FakeTransaction(Broker(), os.urandom(16))


def test_the_commit_of_the_request_commits_the_message(shop: Shop, browser: Browser) -> None:
    before = count(shop.alias)
    assert browser.get("/pay").status_code == 200
    # When the block was left the request had not committed: nothing was decided.
    assert shop.inside == ("open", Decision.RUNNING)
    assert (shop.tx.outcome, count(shop.alias)) == ("committed", before + 1)
    assert shop.marker.check_id(shop.tx.id) is Decision.COMMIT


@pytest.mark.parametrize("how", ["fail", "roll_back"])
def test_a_request_that_rolls_back_leaves_the_message_to_the_checks(shop: Shop, browser: Browser, how: str) -> None:
    before = count(shop.alias)
    assert browser.get(f"/pay?{how}=1").status_code == (500 if how == "fail" else 200)
    assert shop.inside == ("open", Decision.RUNNING)
    assert (shop.tx.outcome, count(shop.alias)) == ("unknown", before)
    assert shop.broker.decisions == {}
    assert shop.marker.check_id(shop.tx.id) is Decision.ROLLBACK


def test_an_atomic_block_inside_the_block_of_the_message(shop: Shop, browser: Browser) -> None:
    before = count(shop.alias)
    browser.get("/pay-inside")
    assert (shop.tx.outcome, count(shop.alias)) == ("committed", before + 1)
    browser.get("/pay-inside?roll_back=1")
    assert (shop.tx.outcome, count(shop.alias)) == ("rolled back", before + 1)


def test_a_duplicate_ends_the_atomic_block(shop: Shop, tx: FakeTransaction) -> None:
    before = count(shop.alias)
    assert shop.marker.check_id(tx.id) is Decision.ROLLBACK
    with transaction.atomic(using=shop.alias):
        insert()
        with pytest.raises(AlreadyRolledBack):
            shop.marker.mark(connections[shop.alias], tx)
        with pytest.raises(TransactionManagementError):
            insert()  # code that swallows the error comes no further
    assert count(shop.alias) == before
    with pytest.raises(AlreadyRolledBack):
        tx.leave()


def test_outside_of_atomic_and_in_savepoints_it_refuses(shop: Shop, tx: FakeTransaction) -> None:
    connection = connections[shop.alias]
    with pytest.raises(MarkRefused, match="atomic"):
        shop.marker.mark(connection, tx)
    refused = pytest.raises(MarkRefused, match="savepoint")
    with transaction.atomic(using=shop.alias), transaction.atomic(using=shop.alias), refused:
        shop.marker.mark(connection, tx)
    again = FakeTransaction(Broker(), os.urandom(16))
    with transaction.atomic(using=shop.alias), transaction.atomic(using=shop.alias, savepoint=False):
        shop.marker.mark(connection, again)
    again.leave()
    assert again.outcome == "committed"


async def test_the_async_client_cannot_leave_its_block_inside_atomic(shop: Shop) -> None:
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
    try:
        tx = AsyncTransaction(Broker(), os.urandom(16))
        with transaction.atomic(using=shop.alias):
            shop.marker.mark(connections[shop.alias], tx)
            with pytest.raises(MarkRefused, match="blocking"):
                await tx.aleave()
        assert shop.marker.check_id(tx.id) is Decision.COMMIT
    finally:
        del os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"]


@pytest.mark.slow
def test_requests_with_the_real_client_and_broker(shop: Shop, browser: Browser, broker: BrokerProcess) -> None:
    marker, before = shop.marker, count(shop.alias)
    with Client(f"kiteq://{broker.address}", group="shop", topics=["trade"], on_check=marker) as client:
        shop.begin = lambda: client.transaction(Message("trade", "paid", "an order"))
        assert browser.get("/pay").status_code == 200
        assert (shop.inside[0], shop.tx.outcome) == ("open", Outcome.COMMITTED)
        assert browser.get("/pay?fail=1").status_code == 500
        assert (shop.inside[0], shop.tx.outcome) == ("open", Outcome.UNKNOWN)
        assert marker.check_id(shop.tx.id) is Decision.ROLLBACK
        browser.get("/pay-inside")
        assert shop.tx.outcome == Outcome.COMMITTED
        browser.get("/pay-inside?roll_back=1")
        assert shop.tx.outcome == Outcome.ROLLED_BACK
    assert count(shop.alias) == before + 2
