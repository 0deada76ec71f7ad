"""Framing: whatever the bytes and however they are cut, packets or one kind of error come out."""

from __future__ import annotations

import tracemalloc
from time import perf_counter

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.errors import RemoteProtocolError
from kiteq.limits import FRAME_ITEMS_MAX, MIB
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import Admin, AdminReply, Packet, Ping, Pong, Publish
from tests.remoting.test_packets import packets

LIMIT = 64 * 1024


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x01"


@given(st.lists(packets, max_size=8), st.data())
def test_packets_survive_any_chopping_of_the_stream(sent: list[Packet], data: st.DataObject) -> None:
    stream = b"".join(map(encode_packet, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = Decoder(LIMIT)
    received: list[Packet] = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += decoder.feed(stream[start:stop])
    assert received == sent
    assert not decoder.has_partial_frame


@given(st.lists(packets, min_size=1, max_size=3))
def test_packets_survive_single_bytes(sent: list[Packet]) -> None:
    decoder = Decoder(LIMIT)
    received = [packet for byte in b"".join(map(encode_packet, sent)) for packet in decoder.feed(bytes([byte]))]
    assert received == sent


@given(packets, st.data())
def test_a_frame_cut_anywhere_is_waited_for(packet: Packet, data: st.DataObject) -> None:
    frame = encode_packet(packet)
    decoder = Decoder(LIMIT)
    cut = data.draw(st.integers(1, len(frame) - 1))
    assert decoder.feed(frame[:cut]) == []
    assert decoder.has_partial_frame
    assert decoder.feed(frame[cut:]) == [packet]


@given(st.lists(st.binary(max_size=100), max_size=5))
def test_random_bytes_raise_nothing_but_a_protocol_error(chunks: list[bytes]) -> None:
    decoder = Decoder(LIMIT)
    try:
        for chunk in chunks:
            decoder.feed(chunk)
    except RemoteProtocolError as error:
        assert len(str(error)) <= 300  # noqa: PT017 the other outcome is as good


@given(st.binary(min_size=1, max_size=200))
def test_random_frames_raise_nothing_but_a_protocol_error(body: bytes) -> None:
    try:
        Decoder(LIMIT).feed(framed(body))
    except RemoteProtocolError as error:
        assert len(str(error)) <= 300  # noqa: PT017 the other outcome is as good


@given(packets, st.data())
def test_a_damaged_frame_raises_nothing_but_a_protocol_error(packet: Packet, data: st.DataObject) -> None:
    frame = bytearray(encode_packet(packet))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(4, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        Decoder(LIMIT).feed(bytes(frame))
    except RemoteProtocolError as error:
        assert len(str(error)) <= 300  # noqa: PT017 the other outcome is as good


@pytest.mark.parametrize("length", [0, LIMIT + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_refused_before_its_frame_arrives(length: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"a frame of {length} bytes"):
        Decoder(LIMIT).feed(length.to_bytes(4, "big"))


@pytest.mark.parametrize("extra", [0, 1])
def test_the_longest_frame_is_exactly_the_limit(extra: int) -> None:
    overhead = len(encode_packet(Publish(1, [bytes(40_000)]))) - 4 - 40_000
    frame = encode_packet(Publish(1, [bytes(LIMIT - overhead + extra)]))
    decoder = Decoder(LIMIT)
    if extra:
        with pytest.raises(RemoteProtocolError):
            decoder.feed(frame)
    else:
        assert len(decoder.feed(frame)) == 1


def test_the_limit_may_be_raised_while_a_frame_is_under_way() -> None:
    frame = encode_packet(Publish(1, [bytes(2 * LIMIT)]))
    decoder = Decoder(LIMIT)
    assert decoder.feed(frame[:3]) == []
    decoder.frame_bytes_max = 4 * LIMIT
    assert decoder.feed(frame[3:]) == [Publish(1, [bytes(2 * LIMIT)])]


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",
        b"\x92\x04",
        b"\x92\x04\x01\x01",
        b"\x01",
        b"\x80",
        b"\x91\x04",
        b"\x93\x06\x01\xa1\xff",
        b"\x93\x06\x01\xa3\xed\xa0\x80",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x93\x06\x01\xdd" + (FRAME_ITEMS_MAX + 1).to_bytes(4, "big") + b"\x01" * (FRAME_ITEMS_MAX + 1),
        b"\x93\x06\x01\xde\x10\x01" + b"".join(msgpack.packb(str(n)) + b"\x01" for n in range(4097)),
        b"\x93\x06\x01\xd4\x05\x00",
        b"\x93\x06\x01\x81\x90\x01",
        b"\x93\x06\x01\x81\x01\x01",
        b"\x93\x06\x01\xca\x7f\xc0\x00\x00",
        b"\x92\xca\x7f\xc0\x00\x00\x01",
        b"\x92\x04\xca\x7f\xc0\x00\x00",
        b"\x92\x04\xc3",
        b"\x92\xc3\x01",
        b"\x92\x04\xff",
        b"\x92\x04\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
        *(b"\x92" + nested(depth) + b"\x01" for depth in (5, 600, 990, 1010, 100_000)),
        *(b"\x92\x04" + nested(depth) for depth in (5, 600, 990, 1010, 100_000)),
        *(b"\x93\x06\x01" + nested(depth) for depth in (5, 600, 990, 1010, 100_000)),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_hostile_frames_are_refused(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refused:
        Decoder(4 * MIB).feed(framed(body))
    assert len(str(refused.value)) <= 300
    assert not str(refused.value).endswith(": "), "it says why"


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"\xff" * 8])
def test_other_protocols_are_refused_at_their_first_bytes(first: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="a frame of"):
        Decoder(LIMIT).feed(first)


@pytest.mark.parametrize(
    "value", [msgpack.Timestamp(1, 2), [msgpack.Timestamp(1)], {"a": [msgpack.Timestamp(1)]}, msgpack.ExtType(5, b"x")]
)
def test_extension_types_are_refused_even_where_any_value_may_stand(value: object) -> None:
    for fields in ([48, 1, "stat", {"a": value}], [49, 1, value]):
        with pytest.raises(RemoteProtocolError):
            Decoder(LIMIT).feed(framed(msgpack.packb(fields)))


def test_plain_values_of_any_kind_are_results() -> None:
    result: dict[str, object] = {"a": [None, True, 1, 1.5, "x", b"y", {"z": []}]}
    for packet in (Admin(1, "stat", result), AdminReply(1, result)):
        assert Decoder(LIMIT).feed(encode_packet(packet)) == [packet]


def test_of_a_key_given_twice_the_last_counts() -> None:
    body = b"\x94\x30\x01\xa4stat\x82\xa1a\x01\xa1a\x02"
    assert Decoder(LIMIT).feed(framed(body)) == [Admin(1, "stat", {"a": 2})]


def test_what_follows_a_frame_is_the_next_frame() -> None:
    two = encode_packet(Ping(1)) + encode_packet(Pong(2))
    decoder = Decoder(LIMIT)
    assert decoder.feed(two + two[:5]) == [Ping(1), Pong(2)]
    assert decoder.feed(two[5:]) == [Ping(1), Pong(2)]


def test_a_large_frame_in_small_chunks_costs_linear_time_and_memory() -> None:
    size = 8 * MIB
    frame = encode_packet(Publish(1, [bytes(size)]))
    chunks = [frame[start : start + 4096] for start in range(0, len(frame), 4096)]
    decoder = Decoder(16 * MIB)
    started = perf_counter()
    received = [packet for chunk in chunks for packet in decoder.feed(chunk)]
    # Copying what is there at each chunk took 3 s for this; now it is a few ms.
    assert perf_counter() - started < 0.25
    assert len(received) == 1
    tracemalloc.start()
    decoder.feed(frame[:4096])
    for start in range(4096, 24_096, 2):
        decoder.feed(frame[start : start + 2])
    assert tracemalloc.get_traced_memory()[1] < 200_000, "small pieces are not kept as objects"
    tracemalloc.stop()
