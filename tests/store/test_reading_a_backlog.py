"""Reading a backlog in pieces leaves nothing out."""

from __future__ import annotations

from pathlib import Path

import pytest

from kiteq.message import Message
from kiteq.store.opening import open_store
from kiteq.store.tables import SEQUENCE_KEY, Table
from kiteq.store.writer import Append, Submission

RECORDS = 7
EXPIRES_MS = 1 << 45


@pytest.mark.parametrize("scheme", ["memory", "lmdb"])
@pytest.mark.parametrize("per_record", [1, 2, 3])
async def test_pieces_of_any_size_hold_each_message_once(tmp_path: Path, scheme: str, per_record: int) -> None:
    url = "memory://" if scheme == "memory" else f"lmdb://{tmp_path / 'data'}"
    store = open_store(url, bytes_max=64 << 20)
    async with store.running():
        topic = store.topic("trade")
        subscription = store.new_subscription("members", topic)
        for record in range(RECORDS):
            submission = Submission()
            store.save_topic(topic, submission)
            blobs = [Message("trade", "pay-succ", b"x" * 100).encoded() for _ in range(per_record)]
            runs = [(per_record, (subscription.number,))]
            first = record * per_record
            submission.appends.append(Append(Table.LOG, topic.number, first, blobs, runs, 0, EXPIRES_MS))
            submission.messages = per_record
            store.writer._write([submission])
        total = RECORDS * per_record
        for bytes_max in (1, 300, 700, 1 << 20):
            start, found = 0, []
            while start < total:
                loaded = store.read_log(subscription, start, total, bytes_max, start)
                found += [sequence for one in loaded for sequence in one.sequences]
                start = loaded[-1].sequences.start  # type: ignore[attr-defined]
            assert found == list(range(total)), f"in pieces of {bytes_max} bytes"


@pytest.mark.parametrize("damaged", [False, True])
async def test_a_read_goes_beyond_its_position_however_large_the_record_before_it_is(damaged: bool) -> None:
    store = open_store("memory://", bytes_max=64 << 20)
    async with store.running():
        topic = store.topic("trade")
        subscription = store.new_subscription("members", topic)
        blob = Message("trade", "pay-succ", b"x" * 1_000).encoded()
        for first in (0, 5):
            submission = Submission()
            store.save_topic(topic, submission)
            runs = [(1, (subscription.number,))]
            submission.appends.append(Append(Table.LOG, topic.number, first, [blob], runs, 0, EXPIRES_MS))
            submission.messages = 1
            store.writer._write([submission])
        if damaged:
            store.tables.apply([(Table.LOG, SEQUENCE_KEY.pack(topic.number, 0), b"?" * 1_000)])
        loaded = store.read_log(subscription, 0, 6, 100, 1)
        assert [sequence for one in loaded for sequence in one.sequences if sequence] == [5]
        assert loaded[-1].sequences == range(6, 6)
