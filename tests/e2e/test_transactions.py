"""Half messages over real sockets: invisible until decided, decided once, all or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from kiteq.binding.bindings import direct, fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.store.half_records import COUNTER_KEY
from kiteq.store.tables import Table
from tests.e2e.wire import JumpingClock, RawClient, Refused, connect, numbered, running

CONFLICT = "transaction_conflict"
UNKNOWN = "unknown_transaction"


def codes(exceptions: list[list[object]]) -> list[tuple[object, object]]:
    return [(exception[0], exception[1]) for exception in exceptions]


async def test_a_half_message_is_delivered_when_it_is_committed(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "members", fanout("t"), window=10)
    [message] = numbered(1)
    prepared = await producer.prepare([message])
    assert prepared.exceptions == []
    assert isinstance(prepared.handles, int)
    await consumer.take_nothing()
    assert (await consumer.row("members"))["pending"] == 0
    assert await producer.commit(message.id + COUNTER_KEY.pack(prepared.handles)) == []
    [delivery] = await consumer.take(1)
    assert delivery.blob == message.encoded()
    assert await consumer.ack([delivery]) == []


async def test_a_rolled_back_message_is_never_delivered(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "members", fanout("t"), window=10)
    [message] = numbered(1)
    await producer.prepare([message])
    assert await producer.roll_back(message.id) == []
    await consumer.take_nothing()
    assert codes(await producer.commit(message.id)) == [(0, CONFLICT)]
    await consumer.take_nothing()


async def test_the_first_decision_is_final(producer: RawClient) -> None:
    one, other = numbered(2)
    await producer.prepare([one, other])
    assert await producer.commit(one.id) == []
    assert await producer.commit(one.id) == []
    assert codes(await producer.roll_back(one.id, other.id)) == [(0, CONFLICT)]
    assert codes(await producer.commit(one.id, other.id)) == [(1, CONFLICT)]


async def test_the_same_transaction_twice_in_one_decision(producer: RawClient) -> None:
    [message] = numbered(1)
    await producer.prepare([message])
    assert await producer.commit(message.id, message.id) == []


async def test_opposite_decisions_at_the_same_time_have_one_winner(server: Broker, producer: RawClient) -> None:
    other = await connect(server, "producers")
    messages = numbered(200)
    await producer.prepare(messages)
    ids = [message.id for message in messages]
    outcomes: dict[str, list[list[object]]] = {}

    async def decide(name: str) -> None:
        outcomes[name] = await (producer.commit(*ids) if name == "commit" else other.roll_back(*ids))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(decide, "commit")
        nursery.start_soon(decide, "rollback")
    losers = {exception[0] for exceptions in outcomes.values() for exception in exceptions}
    assert losers == set(range(200))
    assert sum(map(len, outcomes.values())) == 200
    assert all(exception[1] == CONFLICT for exceptions in outcomes.values() for exception in exceptions)


async def test_nobody_knows_a_transaction_that_was_never_prepared(producer: RawClient) -> None:
    assert codes(await producer.commit(b"x" * 16)) == [(0, UNKNOWN)]
    assert (await producer.admin("stat"))["counters"]["unknown_transactions"] == 1


async def test_only_the_group_that_prepared_decides(server: Broker, producer: RawClient) -> None:
    stranger = await connect(server, "strangers")
    open_one, decided = numbered(2)
    await producer.prepare([open_one, decided])
    await producer.roll_back(decided.id)
    assert codes(await stranger.commit(open_one.id, decided.id)) == [(0, UNKNOWN), (1, UNKNOWN)]
    assert await producer.commit(open_one.id) == []


async def test_messages_of_one_transaction_become_deliverable_together(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "members", fanout("t"), fanout("u"), window=10)
    first, second = Message("t", "a", b"0000000001"), Message("u", "b", b"0000000002")
    third = Message("t", "c", b"0000000003")
    prepared = await producer.prepare([first, second], 2)
    added = await producer.enlist(first.id, [third])
    assert added.handles == prepared.handles
    await consumer.take_nothing()
    assert await producer.commit(first.id) == []
    assert {delivery.blob for delivery in await consumer.take(3)} == {one.encoded() for one in (first, second, third)}
    assert codes((await producer.enlist(first.id, numbered(1))).exceptions) == [(0, UNKNOWN)]


async def test_several_transactions_of_several_messages_in_one_frame(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "members", fanout("t"), window=10)
    messages = numbered(5)
    prepared = await producer.prepare(messages, [1, 3, 1])
    assert await producer.commit(messages[1].id) == []
    assert [delivery.number for delivery in await consumer.take(3)] == [1, 2, 3]
    assert isinstance(prepared.handles, int)
    assert codes(await producer.commit(messages[2].id)) == [(0, UNKNOWN)]
    assert await producer.commit(messages[4].id, messages[0].id) == []
    assert [delivery.number for delivery in await consumer.take(2)] == [4, 0]


@pytest.mark.parametrize("sizes", [0, 2, [1, 1], [3, 0], [4]])
async def test_sizes_that_do_not_add_up_are_refused(producer: RawClient, sizes: int | list[int]) -> None:
    with pytest.raises(Refused, match="add up") as caught:
        await producer.prepare(numbered(3), sizes)
    assert caught.value.code == "bad_argument"
    assert (await producer.prepare(numbered(3))).exceptions == []


async def test_a_transaction_with_one_bad_message_is_refused_whole(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "members", fanout("t"), window=10)
    good, damaged, other = (message.encoded() for message in numbered(3))
    prepared = await producer.prepare([good, damaged[:-1] + b"\0", other], [2, 1])
    assert codes(prepared.exceptions) == [(0, "bad_checksum")]
    assert isinstance(prepared.handles, list)
    assert prepared.handles[0] == 0
    assert codes(await producer.commit(good[:16], other[:16])) == [(0, UNKNOWN)]
    [delivery] = await consumer.take(1)
    assert delivery.blob == other


async def test_a_fly_message_is_refused_in_a_transaction(producer: RawClient) -> None:
    prepared = await producer.prepare([Message("t", "a", b"x", fly=True)])
    assert codes(prepared.exceptions) == [(0, "fly_not_allowed")]


async def test_a_repeated_prepare_gets_the_same_handle(server: Broker, producer: RawClient) -> None:
    messages = numbered(2)
    first = await producer.prepare(messages)
    again = await connect(server, "producers")
    repeated = await again.prepare(messages)
    assert isinstance(first.handles, int)
    assert repeated.handles == [first.handles, first.handles + 1]
    assert repeated.exceptions == []
    await producer.commit(messages[0].id)
    decided = await again.prepare(messages)
    assert codes(decided.exceptions) == [(0, CONFLICT)]
    assert codes((await producer.publish([messages[0]])).exceptions) == [(0, "duplicate")]


async def test_the_open_transactions_of_a_group_are_limited(folder: Path) -> None:
    async with running(folder, half_quota=3) as broker:
        producer = await connect(broker, "producers")
        messages = numbered(5)
        prepared = await producer.prepare(messages)
        assert codes(prepared.exceptions) == [(3, "half_quota"), (4, "half_quota")]
        other = await connect(broker, "others")
        assert (await other.prepare(numbered(3, start=10))).exceptions == []
        await producer.roll_back(messages[0].id)
        assert codes((await producer.prepare(messages[3:])).exceptions) == [(1, "half_quota")]


async def test_decisions_and_half_messages_survive_a_restart(folder: Path) -> None:
    kinds = ("committed", "rolled back", "open")
    messages = numbered(30)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        await connect(broker, "members", fanout("t"))
        await producer.prepare(messages)
        assert await producer.commit(*[one.id for one in messages[:10]]) == []
        assert await producer.roll_back(*[one.id for one in messages[10:20]]) == []
    for _ in range(2):
        async with running(folder) as broker:
            producer = await connect(broker, "producers")
            assert codes(await producer.commit(*[one.id for one in messages[10:20]])) == [
                (index, CONFLICT) for index in range(10)
            ]
            assert await producer.commit(*[one.id for one in messages[:10]]) == []
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=100)
        assert await producer.commit(*[one.id for one in messages[20:]]) == []
        bodies = [delivery.number for delivery in await consumer.take(20)]
        assert bodies == [*range(10), *range(20, 30)], kinds
        await consumer.take_nothing()


async def test_groups_are_fixed_at_the_commit(server: Broker, producer: RawClient) -> None:
    [message] = numbered(1)
    await producer.prepare([message])
    late = await connect(server, "late", direct("t", "a"), window=10)
    await producer.commit(message.id)
    assert len(await late.take(1)) == 1


async def test_the_time_to_live_counts_from_the_commit(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=10)
        [message] = numbered(1, ttl=60)
        await producer.prepare([message])
        clock.advance(3600)
        await producer.commit(message.id)
        assert len(await consumer.take(1)) == 1


async def test_a_delay_counts_from_the_commit(folder: Path, clock: JumpingClock) -> None:
    async with running(folder, clock) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=10)
        plain, late = Message("t", "a", b"0000000001"), Message("t", "a", b"0000000002", delay=60)
        await producer.prepare([plain, late], 2)
        clock.advance(3600)
        await producer.commit(plain.id)
        assert [delivery.number for delivery in await consumer.take(1)] == [1]
        await consumer.take_nothing()
        clock.advance(61)
        assert [delivery.number for delivery in await consumer.take(1)] == [2]


async def test_a_commit_long_after_the_prepare_reads_the_disk(
    folder: Path, clock: JumpingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kiteq.store.half_cache.HALF_CACHE_BYTES_MAX", 1)
    async with running(folder, clock) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=1000)
        messages = numbered(300)
        for start in range(0, 300, 100):
            await producer.prepare(messages[start : start + 100])
        assert await producer.commit(*[message.id for message in messages]) == []
        assert [delivery.number for delivery in await consumer.take(300)] == list(range(300))


async def test_a_store_that_takes_no_messages_any_more_takes_commits(folder: Path) -> None:
    async with running(folder, store_limit=16 << 20) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=10)
        prepared: list[Message] = []
        with pytest.raises(Refused) as refused:
            while True:
                messages = [Message("t", "a", bytes(100_000)) for _ in range(8)]
                await producer.prepare(messages)
                prepared += messages
        assert (refused.value.code, refused.value.temporary) == ("store_full", True)
        assert len(prepared) > 16
        assert await producer.commit(prepared[0].id) == []
        assert await producer.roll_back(*[message.id for message in prepared[1:]]) == []
        [delivery] = await consumer.take(1)
        assert delivery.blob == prepared[0].encoded()
        await consumer.ack([delivery])
        assert (await producer.prepare([messages[0]])).exceptions == []


async def test_a_prepare_with_a_known_first_message_and_a_new_one_is_refused(
    server: Broker, producer: RawClient
) -> None:
    first, second, third = numbered(3)
    await producer.prepare([first, second], 2)
    assert codes((await producer.prepare([first, third], 2)).exceptions) == [(0, "id_reused")]
    assert codes((await producer.prepare([first, second, third], 3)).exceptions) == [(0, "id_reused")]
    assert (await producer.prepare([first, second], 2)).exceptions == []
    assert (await producer.publish([third])).exceptions == []


async def test_an_id_that_two_groups_use(server: Broker, producer: RawClient) -> None:
    other = await connect(server, "others")
    [message] = numbered(1)
    await producer.prepare([message])
    refused = await other.prepare([message])
    assert [exception[:2] + exception[3:] for exception in refused.exceptions] == [[0, "id_reused", False]]
    await producer.commit(message.id)
    assert (await other.prepare([message])).exceptions == []
    assert await producer.commit(message.id) == []
    assert codes(await producer.roll_back(message.id)) == [(0, CONFLICT)]
    await other.roll_back(message.id)
    assert await producer.commit(message.id) == []
    assert codes(await other.commit(message.id)) == [(0, CONFLICT)]


async def test_a_handle_of_another_transaction_decides_nothing(server: Broker, producer: RawClient) -> None:
    consumer = await connect(server, "members", fanout("t"), window=10)
    one, other = numbered(2)
    handles = (await producer.prepare([one, other])).handles
    assert isinstance(handles, int)
    assert codes(await producer.commit(one.id + COUNTER_KEY.pack(handles + 1))) == [(0, UNKNOWN)]
    await consumer.take_nothing()
    assert await producer.commit(one.id + COUNTER_KEY.pack(handles)) == []
    assert len(await consumer.take(1)) == 1


async def test_a_damaged_message_keeps_its_whole_transaction_from_being_committed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kiteq.store.half_cache.HALF_CACHE_BYTES_MAX", 1)
    async with running(folder) as broker:
        producer = await connect(broker, "producers")
        consumer = await connect(broker, "members", fanout("t"), window=10)
        first, second, third = numbered(3)
        await producer.prepare([first, second], 2)
        await producer.prepare([third])
        tables = broker.core.store.tables
        [(key, value), _] = tables.scan(Table.HALF, b"", b"\xff" * 9)
        tables.apply([(Table.HALF, key, value[:-20] + bytes([value[-20] ^ 1]) + value[-19:])])
        assert codes(await producer.commit(first.id, third.id)) == [(0, "damaged")]
        assert [delivery.number for delivery in await consumer.take(1)] == [2]
        assert await producer.roll_back(first.id) == []
        await consumer.take_nothing()
