"""A small Django project: views that pay, in the transaction of their request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import django
import pymysql
from django.conf import settings
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from django.urls import path

from kiteq_client.marker import Marker
from tests.marker.schedule import Broker, FakeTransaction
from tests.support.mariadb import MariaDB
from tests.support.postgres import PostgreSQL

__all__ = ["ALIASES", "Shop", "count", "set_up", "shop"]

ALIASES: Final = ("default", "mariadb", "postgres")


class Shop:
    """What the views use, and what they saw; begin: returns the transaction of a new message, as a block."""

    def __init__(self, alias: str = "default") -> None:
        self.alias = alias
        self.marker = Marker.for_django(alias, lock_timeout=0)
        self.broker = Broker()
        self.begin: Any = self.pretend
        self.tx: Any = None
        self.inside: Any = None

    def pretend(self) -> Any:
        return _Block(FakeTransaction(self.broker, os.urandom(16)))


class _Block:
    """The `with` of a fake transaction."""

    def __init__(self, tx: FakeTransaction) -> None:
        self._tx = tx

    def __enter__(self) -> FakeTransaction:
        return self._tx

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self._tx.leave()
        else:
            self._tx.abandon()


shop = Shop()


def insert() -> None:
    with connections[shop.alias].cursor() as cursor:
        cursor.execute("INSERT INTO payment (id) VALUES (%s)", [os.urandom(16).hex()])


def count(alias: str) -> int:
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT COUNT(*) FROM payment")
        found: int = cursor.fetchone()[0]
        return found


def pay(request: HttpRequest) -> HttpResponse:
    """Pay in the transaction of the request, which goes on when the block of the message is left."""
    with shop.begin() as tx:
        shop.tx = tx
        insert()
        shop.marker.mark(connections[shop.alias], tx)
    shop.inside = (str(tx.outcome), shop.marker.check_id(tx.id))
    if "fail" in request.GET:
        raise RuntimeError("after the block")
    if "roll_back" in request.GET:
        transaction.set_rollback(True, using=shop.alias)
    return HttpResponse("paid")


def pay_inside(request: HttpRequest) -> HttpResponse:
    """Pay in a transaction of its own, inside the block of the message."""
    with shop.begin() as tx:
        shop.tx = tx
        with transaction.atomic(using=shop.alias):
            insert()
            shop.marker.mark(connections[shop.alias], tx)
            if "roll_back" in request.GET:
                transaction.set_rollback(True, using=shop.alias)
    return HttpResponse("paid")


for alias in ALIASES:
    transaction.non_atomic_requests(using=alias)(pay_inside)

urlpatterns = [path("pay", pay), path("pay-inside", pay_inside)]


def set_up(folder: Path, mariadb: MariaDB, postgres: PostgreSQL) -> None:
    """Configure Django, once in a process, and make the tables."""
    pymysql.install_as_MySQLdb()
    server = {"NAME": "kiteq", "USER": "kiteq", "HOST": "127.0.0.1", "ATOMIC_REQUESTS": True}
    mysql = server | {"ENGINE": "django.db.backends.mysql", "PORT": mariadb.port, "OPTIONS": {"ssl_disabled": True}}
    settings.configure(
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": folder / "shop.db", "ATOMIC_REQUESTS": True},
            "mariadb": mysql,
            "postgres": server | {"ENGINE": "django.db.backends.postgresql", "PORT": postgres.port},
        },
        ROOT_URLCONF="tests.marker.django_project",
        ALLOWED_HOSTS=["testserver"],
        SECRET_KEY="for tests",
        USE_TZ=True,
    )
    django.setup()
    for alias in ALIASES:
        marker = Marker.for_django(alias)
        marker.create_table()
        marker.close()
        with connections[alias].cursor() as cursor:
            cursor.execute("CREATE TABLE payment (id CHAR(32) NOT NULL)")
