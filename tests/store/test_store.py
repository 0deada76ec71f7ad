"""What the store knows after it was opened again is what it had committed."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from kiteq.errors import StoreFull
from kiteq.store.store import PAGE_BYTES
from kiteq.store.tables import Table
from tests.store.reopening import KeptTables, OpenStore, owed


def test_cursors_counts_and_messages_are_the_same_after_a_restart() -> None:
    first = OpenStore(KeptTables())
    topic = first.store.topic("trade")
    members = first.subscribe("members", topic)
    points = first.subscribe("points", topic)
    start = topic.next_sequence
    first.publish(topic, 10, members, points)
    first.settle(members, start, start + 3)
    first.settle(members, start + 6, start + 7)
    for snapshot in (False, True):
        if snapshot:
            first.store.submit_snapshot()
            first.commit()
        again = first.again()
        one, other = again.store.subscriptions[members.number], again.store.subscriptions[points.number]
        assert owed(again.store, one) == [start + distance for distance in (4, 5, 8, 9)]
        assert (one.pending, other.pending) == (4, 10)
        assert owed(again.store, other) == list(range(start, start + 10))
        assert one.cursor == members.cursor


def test_a_record_goes_when_its_last_delivery_is_settled() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members, points = opened.subscribe("members", topic), opened.subscribe("points", topic)
    start = topic.next_sequence
    opened.publish(topic, 3, members, points)
    opened.settle(members, start, start + 2)
    assert len(opened.tables.keys(Table.LOG)) == 1
    opened.settle(points, start, start + 2)
    assert opened.tables.keys(Table.LOG) == []


def test_retries_and_dead_letters_are_found_after_a_restart() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members = opened.subscribe("members", topic)
    start = topic.next_sequence
    retried, dead = opened.publish(topic, 2, members)
    submission = opened.submission()
    opened.store.save_retry(members, start, retried, [77, 3, 99, [[1, "c", "no"]], 5], submission)
    opened.store.save_dead(members, 88, "rejected", 1, [[1, "c", "bad"]], dead, submission)
    opened.store.settle(members, range(start, start + 2), start, 0, submission)
    opened.commit(submission)
    again = opened.again()
    found = again.store.subscriptions[members.number]
    assert (found.pending, found.retrying, found.dead) == (0, 1, 1)
    assert again.store.take_recovered().due == [(members.number, start, 77)]
    assert again.store.read_retries(found, [start]) == [(start, retried, [77, 3, 99, [[1, "c", "no"]], 5])]
    (letter,) = again.store.read_dead(found)
    assert (letter.at_ms, letter.message_id, letter.reason, letter.attempts) == (88, dead[:16], "rejected", 1)
    assert letter.blob == dead
    submission = again.submission()
    again.store.forget_retry(found, start, len(retried), submission)
    again.store.forget_dead(found, letter, submission)
    again.commit(submission)
    assert (found.retrying, found.retrying_bytes, found.dead, found.dead_bytes) == (0, 0, 0, 0)
    for table in (Table.RETRY, Table.DUE, Table.DEAD, Table.LOG):
        assert again.tables.keys(table) == []


def test_forgetting_a_dead_letter_takes_back_the_bytes_it_counted() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members = opened.subscribe("members", topic)
    blobs = opened.publish(topic, 2, members)
    submission = opened.submission()
    history: list[list[object]] = [[1, "client", "e" * 500]]
    opened.store.save_dead(members, 1, "rejected", 1, history, blobs[0], submission)
    one = members.dead_bytes
    opened.store.save_dead(members, 2, "rejected", 1, history, blobs[1], submission)
    opened.commit(submission)
    opened.store.forget_dead(members, opened.store.read_dead(members)[0], opened.submission())
    assert members.dead_bytes == one


def test_retries_are_read_up_to_a_size() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members = opened.subscribe("members", topic)
    start = topic.next_sequence
    blobs = opened.publish(topic, 4, members)
    submission = opened.submission()
    for number, blob in enumerate(blobs):
        opened.store.save_retry(members, start + number, blob, [77, 1, 99, [], 5], submission)
    opened.commit(submission)
    wanted = [start + 9, *range(start, start + 4)]
    some = opened.store.read_retries(members, wanted, bytes_max=len(blobs[0]) + 1)
    assert [blob for _, blob, _ in some] == blobs[:2]
    assert len(opened.store.read_retries(members, wanted)) == 4


def test_dead_letters_are_read_in_pages() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members, other = opened.subscribe("members", topic), opened.subscribe("other", topic)
    blobs = opened.publish(topic, 3, members, size=PAGE_BYTES * 2 // 3)
    submission = opened.submission()
    for at_ms, blob in enumerate(blobs):
        opened.store.save_dead(members, at_ms, "rejected", 1, [], blob, submission)
        opened.store.save_dead(other, at_ms, "rejected", 1, [], blob, submission)
    opened.commit(submission)
    first = opened.store.read_dead(members)
    second = opened.store.read_dead(members, first[-1].key)
    assert [[letter.blob for letter in page] for page in (first, second)] == [blobs[:2], blobs[2:]]
    assert opened.store.read_dead(members, second[-1].key) == []
    assert opened.store.read_keys(members, Table.DEAD, first[-1].key) == [second[0].key]


def test_a_refused_batch_does_not_take_the_name_of_its_topic_with_it() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    opened.tables.failures = [StoreFull("full")]
    opened.publish(topic, 1)
    opened.publish(topic, 2)
    refused, accepted = opened.outcomes
    assert isinstance(refused, StoreFull)
    assert accepted is None
    again = opened.again()
    assert [
        len(record.blobs) for _, record in again.store.read_unrouted(again.store.topics["trade"], 0, 1 << 20) if record
    ] == [2]


def test_a_binding_changed_while_settlements_wait_does_not_settle_them() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members = opened.subscribe("members", topic)
    start = topic.next_sequence
    opened.publish(topic, 2, members)
    waiting, changed = opened.submission(), opened.submission()
    opened.store.settle(members, range(start, start + 2), start, 0, waiting)
    opened.store.save_subscription(members, changed)
    opened.commit(changed)
    again = opened.again()
    assert owed(again.store, again.store.subscriptions[members.number]) == [start, start + 1]


def test_a_dropped_subscription_takes_its_rows_with_it() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members = opened.subscribe("members", topic)
    start = topic.next_sequence
    retried, dead, _ = opened.publish(topic, 3, members)
    submission = opened.submission()
    opened.store.save_retry(members, start, retried, [77, 3, 99, [], 5], submission)
    opened.store.save_dead(members, 88, "rejected", 1, [], dead, submission)
    opened.commit(submission)
    submission = opened.submission()
    for table in (Table.DEAD, Table.DUE, Table.RETRY):
        submission.rows += [(table, key, None) for key in opened.store.read_keys(members, table)]
    opened.store.drop_subscription(members, submission)
    opened.commit(submission)
    again = opened.again()
    assert again.store.subscriptions == {}
    for table in (Table.RETRY, Table.DUE, Table.DEAD, Table.LOG):
        assert again.tables.keys(table) == []
    assert again.subscribe("members", again.store.topics["trade"]).number > members.number


def test_sequences_go_on_after_a_restart_with_an_empty_log() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members = opened.subscribe("members", topic)
    start = topic.next_sequence
    opened.publish(topic, 5, members)
    opened.settle(members, start, start + 4)
    opened.store.submit_snapshot()
    opened.commit()
    assert opened.tables.keys(Table.LOG) == []
    for _ in range(3):
        before = opened.store.topics["trade"].next_sequence
        opened = opened.again()
        assert opened.store.topics["trade"].next_sequence >= before
    topic = opened.store.topics["trade"]
    found = opened.store.subscriptions[members.number]
    opened.publish(topic, 2, found)
    assert len(owed(opened.store, found)) == 2


def test_the_epoch_grows_and_the_broker_id_stays() -> None:
    opened = OpenStore(KeptTables())
    again = opened.again()
    assert again.store.epoch == opened.store.epoch + 1
    assert again.store.broker_id == opened.store.broker_id


def test_a_damaged_head_goes_to_quarantine_and_its_neighbours_stay() -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    members = opened.subscribe("members", topic)
    for _ in range(3):
        opened.publish(topic, 2, members)
    first, second, third = opened.tables.keys(Table.LOG)
    value = opened.tables.get(Table.LOG, second)
    assert value is not None
    opened.tables.apply([(Table.LOG, second, b"\xff" + value[1:])])
    again = opened.again()
    assert again.store.damaged_records == 1
    assert again.tables.keys(Table.LOG) == [first, third]
    assert again.tables.keys(Table.QUARANTINE) == [second]
    assert again.store.subscriptions[members.number].pending == 4


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.integers(1, 4), st.sampled_from([(0,), (1,), (0, 1), ()])),
        st.tuples(st.just("settle"), st.integers(0, 1), st.lists(st.integers(0, 11), min_size=1, max_size=4)),
        st.tuples(st.just("snapshot")),
        st.tuples(st.just("reopen")),
    ),
    max_size=25,
)  # fmt: skip


@given(STEPS)
def test_whatever_happens_exactly_the_unsettled_is_owed_after_a_crash(steps: list[tuple[object, ...]]) -> None:
    opened = OpenStore(KeptTables())
    topic = opened.store.topic("trade")
    groups = [opened.subscribe(name, topic) for name in ("members", "points")]
    model: list[set[int]] = [set(), set()]
    used: set[int] = set()
    for step in [*steps, ("reopen",)]:
        match step:
            case ("publish", int(count), tuple(owners)):
                fresh = set(range(topic.next_sequence, topic.next_sequence + count))
                assert not fresh & used
                used |= fresh
                opened.publish(topic, count, *(groups[owner] for owner in owners))
                for owner in owners:
                    model[owner] |= fresh
            case ("settle", int(owner), list(places)):
                waiting = sorted(model[owner])
                for sequence in sorted({waiting[place] for place in places if place < len(waiting)}):
                    opened.settle(groups[owner], sequence, sequence)
                    model[owner].discard(sequence)
            case ("snapshot",):
                opened.store.submit_snapshot()
                opened.commit()
            case _:
                opened = opened.again()
                topic = opened.store.topics["trade"]
                groups = [opened.store.subscriptions[one.number] for one in groups]
        for group, expected in zip(groups, model, strict=True):
            assert owed(opened.store, group) == sorted(expected)
            assert group.pending == len(expected)


async def test_writing_returns_when_it_is_durable_or_with_the_reason() -> None:
    opened = OpenStore(KeptTables())
    outcomes: list[object] = []

    async def write(value: bytes) -> None:
        submission = opened.submission()
        submission.rows.append((Table.DELAYED, b"k", value))
        submission.refusable = True
        outcomes.append(await opened.store.write(submission))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, b"1")
        nursery.start_soon(opened.store.all_durable)
        await trio.testing.wait_all_tasks_blocked()
        assert outcomes == []
        opened.commit()
    assert outcomes == [None]
    assert opened.tables.get(Table.DELAYED, b"k") == b"1"
    opened.tables.failures = [StoreFull("full")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, b"2")
        await trio.testing.wait_all_tasks_blocked()
        opened.commit()
    assert isinstance(outcomes[1], StoreFull)
    assert opened.tables.get(Table.DELAYED, b"k") == b"1"
