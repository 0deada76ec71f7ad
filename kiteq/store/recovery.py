"""Rebuilds what the store knows from its rows: snapshot of cursors, tail of settlements, heads of the log."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgpack

from kiteq.binding.bindings import from_wire
from kiteq.errors import KiteQError, StoreUnusable
from kiteq.store import records
from kiteq.store.half_recovery import RecoveredHalves, recover_halves
from kiteq.store.intervals import IntervalSet
from kiteq.store.state import Subscription, TopicLog
from kiteq.store.tables import PREFIX, SEQUENCE_KEY, Row, Table, Tables
from kiteq.store.writer import COMMIT_KEY, Recent, parse_recent, parse_settled

__all__ = ["META_SNAPSHOT", "Recovered", "recover", "subscription_key", "subscription_value", "topic_key"]

FORMAT_VERSION: Final = 2
FORMATS_READ: Final = (1, 2)
"""Format 1 has no transactions and no delayed messages; it becomes 2 when it is opened."""
SCAN_BYTES: Final = 8 << 20
END: Final = b"\xff" * 16

META_FORMAT: Final = b"format"
META_BROKER_ID: Final = b"broker-id"
META_EPOCH: Final = b"epoch"
META_SNAPSHOT: Final = b"snapshot"
META_NUMBERS: Final = b"numbers"
META_TOPIC: Final = b"t"
META_SUBSCRIPTION: Final = b"s"


class Recovered(NamedTuple):
    """What a store holds when it is opened."""

    broker_id: str
    epoch: int
    topics: dict[str, TopicLog]
    subscriptions: dict[int, Subscription]
    next_number: int
    next_commit: int
    settled_commits: list[int]
    """Commits that have a row of settlements."""
    recent_from: int
    recent: list[tuple[int, int, list[Recent]]]
    """(commit, ms since 1970, ids) in order."""
    due: list[tuple[int, int, int]]
    """(subscription, sequence, due ms) of what waits for another attempt."""
    damaged: int
    """Records whose head did not match its checksum: moved to quarantine."""
    halves: RecoveredHalves


def topic_key(number: int) -> bytes:
    """Return the key of a topic's row in the meta table."""
    return META_TOPIC + PREFIX.pack(number)


def subscription_key(number: int) -> bytes:
    """Return the key of a subscription's row in the meta table."""
    return META_SUBSCRIPTION + PREFIX.pack(number)


def subscription_value(group: str, topic: int, bindings: list[list[object]], start: int, *, active: bool) -> bytes:
    """Return the row of a subscription. While not active it takes over kept messages and is not routed to."""
    packed: bytes = msgpack.packb([group, topic, bindings, start, active])
    return packed


def recover(tables: Tables) -> Recovered:
    """Read everything; repair what a crash left half done. Raises `StoreUnusable`."""
    version = tables.get(Table.META, META_FORMAT)
    if version is not None and int(version) not in FORMATS_READ:
        raise StoreUnusable(
            f"the store has format {int(version)}, this kiteq reads format {FORMAT_VERSION}: "
            + ("upgrade kiteq" if int(version) > FORMAT_VERSION else "open it once with the kiteq that wrote it")
        )
    broker_id = (tables.get(Table.META, META_BROKER_ID) or secrets.token_hex(8).encode()).decode()
    epoch = int(tables.get(Table.META, META_EPOCH) or b"0") + 1
    rows: list[Row] = [
        (Table.META, META_FORMAT, b"%d" % FORMAT_VERSION),
        (Table.META, META_BROKER_ID, broker_id.encode()),
        (Table.META, META_EPOCH, b"%d" % epoch),
    ]
    topics = _topics(tables)
    subscriptions = _subscriptions(tables, topics, rows)
    settled_rows = _settlements(tables, subscriptions)
    damaged = sum(_log(tables, topic, subscriptions, rows) for topic in topics.values())
    for topic in topics.values():
        _unrouted(tables, topic)
    due = _retries(tables, subscriptions, rows)
    _dead(tables, subscriptions)
    halves = recover_halves(tables, rows)
    recent = _recent(tables)
    for subscription in subscriptions.values():
        topic = subscription.topic
        topic.next_sequence = max(topic.next_sequence, subscription.cursor.floor, *subscription.cursor.ranges, 0)
    for topic in topics.values():
        topic.next_sequence = topic.committed = topic.next_sequence + 1
    tables.apply(rows)
    next_commit = max([*settled_rows, *(row[0] for row in recent)], default=0) + 1
    numbers = [int(tables.get(Table.META, META_NUMBERS) or b"0"), *(n + 1 for n in subscriptions)]
    numbers += [topic.number + 1 for topic in topics.values()]
    return Recovered(
        broker_id=broker_id,
        epoch=epoch,
        topics={topic.name: topic for topic in topics.values()},
        subscriptions=subscriptions,
        next_number=max(numbers),
        next_commit=next_commit,
        settled_commits=settled_rows,
        recent_from=recent[0][0] if recent else next_commit,
        recent=recent,
        due=due,
        damaged=damaged + halves.damaged,
        halves=halves,
    )


def _rows_of_prefix(tables: Tables, prefix: bytes) -> list[tuple[int, bytes]]:
    end = prefix[:-1] + bytes([prefix[-1] + 1])
    return [
        (PREFIX.unpack(key[1:])[0], value)
        for key, value in tables.scan(Table.META, prefix, end)
        if len(key) == 1 + PREFIX.size
    ]


def _topics(tables: Tables) -> dict[int, TopicLog]:
    topics = {number: TopicLog(number, name.decode()) for number, name in _rows_of_prefix(tables, META_TOPIC)}
    for topic in topics.values():
        topic.stored = True
    return topics


def _subscriptions(tables: Tables, topics: dict[int, TopicLog], rows: list[Row]) -> dict[int, Subscription]:
    subscriptions: dict[int, Subscription] = {}
    for number, value in _rows_of_prefix(tables, META_SUBSCRIPTION):
        group, topic, wire_bindings, start, active = msgpack.unpackb(value)
        if active:
            bindings = [from_wire(wire) for wire in wire_bindings]
            subscriptions[number] = Subscription(number, group, topics[topic], bindings, start)
        else:
            rows.append((Table.META, subscription_key(number), None))
            for key, _ in _dead_rows(tables, number):
                rows.append((Table.DEAD, key, None))
    return subscriptions


def _settlements(tables: Tables, subscriptions: dict[int, Subscription]) -> list[int]:
    """Bring the cursors up to date: the snapshot, then every settlement still kept (adding twice is harmless)."""
    for number, ranges in msgpack.unpackb(tables.get(Table.META, META_SNAPSHOT) or msgpack.packb([])):
        if number in subscriptions:
            floor, *rest = ranges
            subscriptions[number].cursor = IntervalSet(max(floor, subscriptions[number].cursor.floor), rest)
    commits: list[int] = []
    for key, value in tables.scan(Table.SETTLED, b"", END):
        commits.append(COMMIT_KEY.unpack(key)[0])
        try:
            settled = parse_settled(key, value)
        except KiteQError:
            continue  # those messages are delivered again: at least once holds
        for number, first, last in settled:
            if number in subscriptions:
                subscriptions[number].cursor.add(first, last)
    return commits


def _log(tables: Tables, topic: TopicLog, subscriptions: dict[int, Subscription], rows: list[Row]) -> int:
    """Index the records of a topic; return how many were damaged."""
    here = {number: one for number, one in subscriptions.items() if one.topic is topic}
    start, end = SEQUENCE_KEY.pack(topic.number, 0), PREFIX.pack(topic.number + 1)
    damaged = 0
    while page := tables.scan(Table.LOG, start, end, bytes_max=SCAN_BYTES):
        for key, value in page:
            first = SEQUENCE_KEY.unpack(key)[1]
            try:
                head = records.parse_head(key, value)
            except records.DamagedRecord:
                damaged += 1
                rows += [(Table.QUARANTINE, key, value), (Table.LOG, key, None)]
                topic.next_sequence = max(topic.next_sequence, first + len(value))
                continue
            owed = _owed(key, value, head, here)
            total = sum(messages * len(owners) for messages, owners in head.runs)
            if owed:
                topic.index.append(first, owed, total, head.expires_ms)
            else:
                rows.append((Table.LOG, key, None))
            topic.next_sequence = records.sequences(key, value, head)[-1]
        start = page[-1][0] + b"\0"
    return damaged


def _unrouted(tables: Tables, topic: TopicLog) -> None:
    """Go on behind the messages kept apart: a sequence given twice would overwrite one of them."""
    start, end = SEQUENCE_KEY.pack(topic.number, 0), PREFIX.pack(topic.number + 1)
    while page := tables.scan(Table.UNROUTED, start, end, bytes_max=SCAN_BYTES):
        for key, value in page:
            try:
                last = records.sequences(key, value, records.parse_head(key, value))[-1]
            except records.DamagedRecord:
                last = SEQUENCE_KEY.unpack(key)[1] + len(value)
            topic.next_sequence = max(topic.next_sequence, last)
        start = page[-1][0] + b"\0"


def _owed(key: bytes, value: bytes, head: records.Head, here: dict[int, Subscription]) -> int:
    """Count the deliveries a record is still owed for, and add them to their subscriptions."""
    first = SEQUENCE_KEY.unpack(key)[1]
    mean_bytes = (len(value) - head.size) // head.messages
    owed = 0
    sequences = records.sequences(key, value, head)
    position = 0
    for messages, owners in head.runs:
        for number in owners:
            subscription = here.get(number)
            if subscription is None:
                continue
            cursor = subscription.cursor
            if cursor.floor <= first and not cursor.ranges:
                mine = messages
            else:
                mine = sum(sequences[at] not in cursor for at in range(position, position + messages))
            subscription.pending += mine
            subscription.pending_bytes += mine * mean_bytes
            owed += mine
        position += messages
    return owed


def _retries(tables: Tables, subscriptions: dict[int, Subscription], rows: list[Row]) -> list[tuple[int, int, int]]:
    due: list[tuple[int, int, int]] = []
    for key, value in tables.scan(Table.DUE, b"", END):
        number, sequence = SEQUENCE_KEY.unpack(key)
        blob = tables.get(Table.RETRY, key)
        if number not in subscriptions or blob is None:
            rows += [(Table.DUE, key, None), (Table.RETRY, key, None)]
            continue
        topic = subscriptions[number].topic
        topic.next_sequence = max(topic.next_sequence, sequence)  # replayed dead letters are in no log
        subscriptions[number].retrying += 1
        subscriptions[number].retrying_bytes += len(blob)
        due.append((number, sequence, msgpack.unpackb(value)[0]))
    return due


def _dead(tables: Tables, subscriptions: dict[int, Subscription]) -> None:
    for number, subscription in subscriptions.items():
        for _, value in _dead_rows(tables, number):
            subscription.dead += 1
            subscription.dead_bytes += len(value)


def _dead_rows(tables: Tables, number: int) -> Iterator[tuple[bytes, bytes]]:
    """Return the dead letters of a subscription, read a page at a time: they may be larger than the memory."""
    start, end = PREFIX.pack(number), PREFIX.pack(number + 1)
    while page := tables.scan(Table.DEAD, start, end, bytes_max=SCAN_BYTES):
        yield from page
        start = page[-1][0] + b"\0"


def _recent(tables: Tables) -> list[tuple[int, int, list[Recent]]]:
    recent: list[tuple[int, int, list[Recent]]] = []
    for key, value in tables.scan(Table.RECENT, b"", END):
        try:
            at_ms, ids = parse_recent(key, value)
        except KiteQError:
            continue  # a repeat of those sends would be stored again: at least once holds
        recent.append((COMMIT_KEY.unpack(key)[0], at_ms, ids))
    return recent
