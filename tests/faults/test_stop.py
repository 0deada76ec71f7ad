"""A broker that ends by itself writes what it has settled before it writes how far it has settled."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker, serve
from kiteq.config import Settings
from kiteq.message import Message
from tests.faults.checker import check
from tests.faults.driver import open_connection
from tests.faults.history import BrokerStopped, Drained, History, read_histories
from tests.faults.load import final_state
from tests.faults.scenarios import arrivals
from tests.support.broker import DISK_FREE_MIN

pytestmark = pytest.mark.slow


def _port(broker: Broker) -> int:
    return int(broker.address.rpartition(":")[2])


async def test_a_failure_in_the_last_moment_of_a_broker_is_written(tmp_path: Path) -> None:
    settings = Settings(bind="127.0.0.1:0", db=f"lmdb://{tmp_path / 'store'}", disk_free_min=DISK_FREE_MIN)
    with History(tmp_path / "history.jsonl") as history, trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            broker: Broker = await nursery.start(serve, settings)
            consumer = await open_connection(_port(broker), "a", history, bindings=[fanout("orders")])
            await consumer.credit(10)
            producer = await open_connection(_port(broker), "producer", history)
            await producer.publish([Message("orders", "paid", b"once", deliver_limit=1)])
            await producer.answered()
            await arrivals(consumer, 1)
            broker.core.draining = True  # the ends of connections are no turns any more
            held = len(broker.core.peers)
            await consumer.drop()
            while len(broker.core.peers) == held:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        now = time.monotonic()
        history.write(BrokerStopped(now, now, "cancelled"))
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(serve, settings)
            inspector = await open_connection(_port(broker), "inspector", history)
            history.write(Drained(time.monotonic(), True))
            await final_state(inspector, history)
            await inspector.goodbye()
            nursery.cancel_scope.cancel()
        await producer.drop()
    assert [str(violation) for violation in check(read_histories([tmp_path / "history.jsonl"]))] == []
