"""Taking back a message before its time."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.remoting import packets
from kiteq.store.tables import Table
from tests.e2e.test_delays import rows_in, wait_delayed
from tests.e2e.test_settling import HeldTables
from tests.e2e.wire import PATIENCE_SECONDS, JumpingClock, RawClient, Refused, connect, numbered, running


async def refusal_of(client: RawClient, **arguments: object) -> tuple[str, str]:
    with pytest.raises(Refused) as refused:
        await client.admin("msg.cancel", **arguments)
    return refused.value.code, refused.value.reason


async def test_a_cancelled_message_never_comes_and_its_neighbours_do(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=100)
    messages = numbered(5, delay=60)
    await producer.publish(messages)
    assert await producer.admin("msg.cancel", id=messages[1].id.hex()) == {"cancelled": 1}
    assert await producer.admin("msg.cancel", id=messages[4].id.hex(), group="producers") == {"cancelled": 1}
    told = await wait_delayed(producer, 3)
    assert told["bytes"] == sum(len(value) for _, value in rows_in(server))
    clock.advance(61)
    assert [one.number for one in await consumer.take(3)] == [0, 2, 3]
    await wait_delayed(producer, 0)
    assert rows_in(server) == []


async def test_what_does_not_wait_cannot_be_cancelled(server: Broker, producer: RawClient, clock: JumpingClock) -> None:
    consumer = await connect(server, "g", fanout("t"), window=100)
    (plain,), (delayed,) = numbered(1), numbered(1, start=1, delay=60)
    await producer.publish([plain, delayed])
    code, reason = await refusal_of(producer, id=plain.id.hex())
    assert (code, reason) == ("unknown_message", f"no message {plain.id.hex()} waits for its time")
    code, reason = await refusal_of(producer, id=delayed.id.hex(), group="others")
    assert (code, reason) == ("unknown_message", f"no message {delayed.id.hex()} of group 'others' waits for its time")
    clock.advance(61)
    await consumer.take(2)
    assert (await refusal_of(producer, id=delayed.id.hex()))[0] == "unknown_message"


@pytest.mark.parametrize("arguments", [{}, {"id": 5}, {"id": "xyz"}, {"id": "00"}, {"id": "00" * 16, "group": 5}])
async def test_a_malformed_request_is_refused(producer: RawClient, arguments: dict[str, object]) -> None:
    assert (await refusal_of(producer, **arguments))[0] == "bad_argument"


async def test_one_id_of_two_groups_is_cancelled_in_both_or_in_the_one_that_is_named(server: Broker) -> None:
    shop, bank = await connect(server, "shop"), await connect(server, "bank")
    twins = [Message("t", "a", b"1", id="ab" * 16, delay=60), Message("t", "a", b"2", id="cd" * 16, delay=60)]
    await shop.publish(twins)
    await bank.publish(twins)
    assert await shop.admin("msg.cancel", id="ab" * 16) == {"cancelled": 2}
    assert await shop.admin("msg.cancel", id="cd" * 16, group="bank") == {"cancelled": 1}
    assert (await refusal_of(shop, id="cd" * 16, group="bank"))[0] == "unknown_message"
    assert await shop.admin("msg.cancel", id="cd" * 16) == {"cancelled": 1}
    assert rows_in(server) == []


async def test_cancelled_stays_cancelled_over_a_restart_and_a_repeat(folder: Path, clock: JumpingClock) -> None:
    messages = numbered(3, delay=60)
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        consumer = await connect(broker, "g", fanout("t"))
        await producer.publish(messages)
        await producer.admin("msg.cancel", id=messages[1].id.hex())
    async with running(folder, clock) as broker:
        producer = await connect(broker, "p")
        receipts = await producer.publish(messages)
        assert [code for _, code, *_ in receipts.exceptions] == ["duplicate"] * 3
        consumer = await connect(broker, "g", window=10)
        clock.advance(61)
        assert [one.number for one in await consumer.take(2)] == [0, 2]
        await consumer.take_nothing(0.05)


async def test_the_next_one_is_waited_for_when_the_first_is_cancelled(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    first, second = numbered(2, delay=30)
    await producer.publish([first])
    next_ms = (await wait_delayed(producer, 1))["next_due_ms"]
    await producer.admin("msg.cancel", id=first.id.hex())
    assert (await wait_delayed(producer, 0))["next_due_ms"] is None
    await producer.publish([second])
    assert (await wait_delayed(producer, 1))["next_due_ms"] >= next_ms
    await producer.publish(numbered(1, start=5, delay=0.02))
    assert [one.number for one in await consumer.take(1)] == [5]


async def test_what_is_damaged_cannot_be_cancelled_and_is_left_for_quarantine(
    server: Broker, producer: RawClient
) -> None:
    (message,) = numbered(1, delay=60)
    await producer.publish([message])
    ((key, value),) = rows_in(server)
    server.core.store.tables.apply([(Table.DELAYED, key, value[:10] + b"?" + value[11:])])
    assert (await refusal_of(producer, id=message.id.hex()))[0] == "unknown_message"
    assert len(rows_in(server)) == 1


async def test_what_is_on_its_way_into_the_log_cannot_be_cancelled_any_more(
    server: Broker, producer: RawClient, clock: JumpingClock
) -> None:
    consumer = await connect(server, "g", fanout("t"), window=10)
    (message,) = numbered(1, delay=60)
    await producer.publish([message])
    writer = server.core.store.writer
    held = HeldTables(writer._tables)
    writer._tables = held  # type: ignore[assignment]
    try:
        clock.advance(61)
        with trio.fail_after(PATIENCE_SECONDS):
            while not server.core.delays.lock.locked():  # noqa: ASYNC110 until the timer has taken it up
                await trio.sleep(0.01)
        await producer.send(packets.Admin(9, "msg.cancel", {"id": message.id.hex()}))
        await trio.sleep(0.1)  # the row is there, and stays until the commit is released
        assert len(rows_in(server)) == 1
    finally:
        held.released.set()
    with pytest.raises(Refused, match="waits for its time"):
        await producer.wait(packets.AdminReply, 9)
    assert [one.number for one in await consumer.take(1)] == [0]


async def test_a_message_is_either_cancelled_or_delivered(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "g", fanout("t"), window=1_000)
    due_s = server.core.clock.epoch_ms() / 1000 + 0.4
    messages = [one for n in range(40) for one in numbered(1, start=n, deliver_at=due_s + n // 4 * 0.004)]
    for one in messages:
        await producer.publish([one])
    cancelled: set[int] = set()
    await trio.sleep(due_s - server.core.clock.epoch_ms() / 1000 - 0.01)
    for at in range(0, 40, 8):
        requests = {producer.next_request(): number for number in range(at, at + 8)}
        await producer.send(
            *(packets.Admin(request, "msg.cancel", {"id": messages[n].id.hex()}) for request, n in requests.items())
        )
        for request, number in requests.items():
            try:
                reply = await producer.wait(packets.AdminReply, request)
                assert reply.result == {"cancelled": 1}
                cancelled.add(number)
            except Refused as refused:
                assert refused.code == "unknown_message"  # noqa: PT017
    delivered = {one.number for one in await consumer.take(40 - len(cancelled))}
    await consumer.take_nothing(0.1)
    assert delivered == set(range(40)) - cancelled
    assert rows_in(server) == []
