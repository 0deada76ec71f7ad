"""Producers and checks in truly parallel threads, with real waits for locks; and processes that are killed."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path

import pytest

from kiteq_client.decision import Decision
from kiteq_client.marker import Marker
from tests.marker.databases import Database, MariaDBDatabase, PostgresDatabase, SqliteDatabase, execute
from tests.marker.schedule import Broker, FakeTransaction

ROOT = Path(__file__).resolve().parent.parent.parent
PRODUCERS = 4
CHECKERS = 3
MESSAGES_OF_A_PRODUCER = 60
SETTLE_SECONDS_MAX = 30.0
KILLS = 6
TRANSACTIONS_OF_A_PROCESS = 30


class Race:
    """What the threads of a race share; the lock stands for the broker's single thread."""

    def __init__(self, database: Database, marker: Marker, seed: int) -> None:
        self.database = database
        self.marker = marker
        self.seed = seed
        self.broker = Broker()
        self.lock = threading.Lock()
        self.open: list[bytes] = []
        self.ids: list[bytes] = []
        self.ended = threading.Event()

    def decide(self, message: bytes, decision: Decision) -> None:
        with self.lock:
            self.broker.decide(message, decision)

    def produce(self, number: int) -> None:
        chance = random.Random(self.seed + number)
        connection = self.database.connect()
        for _ in range(MESSAGES_OF_A_PRODUCER):
            message = chance.randbytes(16)
            with self.lock:
                self.ids.append(message)
                self.open.append(message)
            if chance.random() < 0.2:
                time.sleep(0.001)  # a check may come first
            tx = LockedTransaction(self, message)
            crashes = chance.random() < 0.2
            try:
                execute(connection, f"INSERT INTO business (id) VALUES ('{message.hex()}')")
                self.marker.mark(connection, tx)
                if chance.random() < 0.2:
                    time.sleep(0.001)  # a check waits for it
                if crashes:
                    connection.close()
                elif chance.random() < 0.3:
                    connection.rollback()
                else:
                    connection.commit()
                if not crashes:
                    tx.leave()
            except Exception:  # noqa: BLE001 as any user's code
                with suppress(Exception):
                    connection.rollback()
            if crashes:
                with suppress(Exception):
                    connection.close()
                connection = self.database.connect()
        connection.close()

    def check(self, number: int) -> None:
        chance = random.Random(self.seed - number)
        while not self.ended.is_set():
            with self.lock:
                message = chance.choice(self.open[-PRODUCERS:]) if self.open else None
            if message is not None:
                self.decide(message, self.marker.check_id(message))


class LockedTransaction(FakeTransaction):
    def __init__(self, race: Race, message: bytes) -> None:
        super().__init__(race.broker, message)
        self._race = race

    def commit(self) -> None:
        with self._race.lock:
            super().commit()

    def rollback(self) -> None:
        with self._race.lock:
            super().rollback()


def settle(marker: Marker, broker: Broker, messages: list[bytes]) -> None:
    """Ask until everything is decided."""
    deadline = time.monotonic() + SETTLE_SECONDS_MAX
    for message in messages:
        while message not in broker.decisions:
            assert time.monotonic() < deadline
            broker.decide(message, marker.check_id(message))


def committed(broker: Broker) -> set[str]:
    return {message.hex() for message, decision in broker.decisions.items() if decision is Decision.COMMIT}


def business_rows(database: Database) -> set[str]:
    connection = database.connect()
    rows = {str(row[0]) for row in execute(connection, "SELECT id FROM business")}
    connection.close()
    return rows


@pytest.mark.slow
def test_parallel_producers_and_checks_agree(database: Database) -> None:
    seed = random.SystemRandom().randrange(2**32)
    with closing(Marker(database.own, lock_timeout=0.05)) as marker:
        race = Race(database, marker, seed)
        with ThreadPoolExecutor(PRODUCERS + CHECKERS) as threads:
            checkers = [threads.submit(race.check, number) for number in range(CHECKERS)]
            producers = [threads.submit(race.produce, number) for number in range(PRODUCERS)]
            try:
                for producer in producers:
                    producer.result()
            finally:
                race.ended.set()
            for checker in checkers:
                checker.result()
        settle(marker, race.broker, race.ids)
    assert (committed(race.broker), race.broker.conflicts) == (business_rows(database), []), f"seed {seed}"
    assert 0 < len(business_rows(database)) < PRODUCERS * MESSAGES_OF_A_PRODUCER


PRODUCER = """
import random, sys
from kiteq_client.marker import Marker
from tests.marker.databases import execute
from tests.marker.schedule import Broker, FakeTransaction

def connect():
    {connect}

marker = Marker(connect)
chance = random.Random({seed})
held = []
for number in range({count}):
    message = chance.randbytes(16)
    print(message.hex(), flush=True)
    connection = connect()
    held.append(connection)
    steps = chance.randint(0, 3)
    if steps > 0:
        execute(connection, "INSERT INTO business (id) VALUES ('%s')" % message.hex())
    if steps > 1:
        marker.mark(connection, FakeTransaction(Broker(), message))
    if steps > 2 or {alone}:
        (connection.commit if steps > 2 else connection.rollback)()
    held = held[-1:] if {alone} else held
print("held", flush=True)
sys.stdin.read()
"""


def connecting(database: Database) -> str:
    """Return the body of a function that connects from another process."""
    if isinstance(database, SqliteDatabase):
        return f"import sqlite3; return sqlite3.connect({str(database.path)!r}, timeout=10)"
    if isinstance(database, MariaDBDatabase):
        return (
            f"import pymysql; return pymysql.connect(host={database.server.host!r}, port={database.server.port}, "
            f"user='kiteq', database={database.database!r}, ssl_disabled=True)"
        )
    assert isinstance(database, PostgresDatabase)
    return (
        f"import psycopg; return psycopg.connect(host={database.server.host!r}, port={database.server.port}, "
        f"user='kiteq', dbname={database.database!r})"
    )


@pytest.mark.slow
def test_killed_processes_leave_no_business_row_without_its_message(database: Database) -> None:
    # SQLite has one writer at a time: there the process ends each transaction but the one it is killed in.
    seed = random.SystemRandom().randrange(2**32)
    broker = Broker()
    messages: list[bytes] = []
    with closing(Marker(database.own, lock_timeout=0.05)) as marker:
        for kill in range(KILLS):
            program = PRODUCER.format(
                connect=connecting(database), seed=seed + kill, count=TRANSACTIONS_OF_A_PROCESS,
                alone=database.name == "sqlite",
            )  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            lines = random.Random(seed + kill).randint(1, TRANSACTIONS_OF_A_PROCESS + 1)
            begun = list(islice(process.stdout, lines))
            process.kill()
            begun += process.stdout  # not communicate(): it would miss what is buffered
            process.communicate()
            words = [line.strip() for line in begun]
            found = [bytes.fromhex(word) for word in words if len(word) == 32]
            assert found
            messages += found
            settle(marker, broker, found)
    assert (committed(broker), broker.conflicts) == (business_rows(database), []), f"seed {seed}"
    assert 0 < len(committed(broker)) < len(messages)
