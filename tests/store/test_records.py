"""A record gives back what was put in, and never a message that is not the one that was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.message import Message
from kiteq.store import records
from kiteq.store.tables import SEQUENCE_KEY

KEY = SEQUENCE_KEY.pack(3, 1_000)
OWNERS = st.lists(st.integers(0, 0xFFFFFFFF), max_size=3).map(tuple)
BODIES = st.lists(st.tuples(st.binary(max_size=40), OWNERS, st.integers(1, 9)), min_size=1, max_size=12)


def make(bodies: list[tuple[bytes, tuple[int, ...], int]], *, sparse: bool) -> tuple[list[bytes], list[int], bytes]:
    blobs = [Message("trade", "pay", body).encoded() for body, _, _ in bodies]
    relative, position = [], 0
    for _, _, step in bodies:
        position += step if sparse else 1
        relative.append(position - (0 if sparse else 1))
    runs = records.join_runs([(1, owners) for _, owners, _ in bodies])
    return blobs, relative, records.build(KEY, blobs, runs, 5, 77, relative if sparse else None)


@given(BODIES, st.booleans())
def test_a_record_is_read_as_it_was_built(bodies: list[tuple[bytes, tuple[int, ...], int]], sparse: bool) -> None:
    blobs, relative, value = make(bodies, sparse=sparse)
    record = records.read(KEY, value)
    assert record.blobs == blobs
    assert list(record.sequences) == [1_000 + distance for distance in relative]
    assert record.owners == [owners for _, owners, _ in bodies]
    assert (record.accepted_ms, record.expires_ms, record.damaged) == (5, 77, [])
    head = records.parse_head(KEY, value)
    assert (head.messages, head.sparse, head.accepted_ms) == (len(blobs), sparse, 5)
    assert value[head.size :] == b"".join(blobs)


@pytest.mark.parametrize("sparse", [False, True])
def test_every_flipped_bit_is_noticed(sparse: bool) -> None:
    blobs, relative, value = make([(b"a", (1,), 1), (b"bb", (1, 2), 4), (b"", (2,), 1)], sparse=sparse)
    sequences = [1_000 + distance for distance in relative]
    good = dict(zip(sequences, blobs, strict=True))
    for position in range(len(value)):
        for bit in range(8):
            bad = bytearray(value)
            bad[position] ^= 1 << bit
            try:
                record = records.read(KEY, bytes(bad))
            except records.DamagedRecord:
                continue
            assert len(record.damaged) == 1, "a damaged body harms one message"
            for sequence, blob in zip(record.sequences, record.blobs, strict=True):
                assert good[sequence] == blob
            ((missing, owners),) = record.damaged
            assert {missing, *record.sequences} == set(sequences)
            assert owners == [(1,), (1, 2), (2,)][sequences.index(missing)]


def test_a_record_under_another_key_is_damaged() -> None:
    _, _, value = make([(b"a", (1,), 1)], sparse=False)
    with pytest.raises(records.DamagedRecord):
        records.read(SEQUENCE_KEY.pack(3, 1_001), value)


def test_a_record_cut_short_is_noticed_or_has_the_messages_it_has() -> None:
    blobs, _, value = make([(b"a" * 20, (1,), 1), (b"b" * 20, (1,), 1)], sparse=False)
    for size in range(len(value)):
        try:
            record = records.read(KEY, value[:size])
        except records.DamagedRecord:
            continue
        assert record.damaged
        assert all(blob in blobs for blob in record.blobs)


def test_a_message_of_another_record_does_not_pass() -> None:
    _, _, one = make([(b"same length", (1,), 1)], sparse=False)
    other = Message("trade", "pay", b"SAME LENGTH").encoded()
    record = records.read(KEY, one[: -len(other)] + other)
    assert (record.blobs, record.damaged) == ([], [(1_000, (1,))])
