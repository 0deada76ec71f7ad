"""Packets: what each holds, and what none may hold."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.errors import LocalProtocolError, RemoteProtocolError
from kiteq.limits import FRAME_ITEMS_MAX, PREFETCH_MAX
from kiteq.remoting import codec
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import SHAPES, TYPE_NUMBERS, Credit, Packet, Ping, parse_packet
from kiteq.remoting.packets import Publish as PublishPacket

u32 = st.integers(0, (1 << 32) - 1)
u63 = st.integers(0, (1 << 63) - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
blobs = st.lists(st.binary(max_size=40), min_size=1, max_size=5)
ranges = st.lists(st.tuples(u63, u63).map(sorted), max_size=5).map(
    lambda pairs: [end for pair in pairs for end in pair]
)
rising = st.lists(u63, max_size=8, unique=True).map(lambda ends: sorted(ends)[: len(ends) // 2 * 2])
one_or_many = st.one_of(u32, st.lists(u63, max_size=5))
bindings = st.lists(
    st.tuples(
        text, st.integers(0, 2), text, st.one_of(st.none(), u32), st.booleans(), st.sampled_from(["latest", "first"])
    ).map(list),
    max_size=3,
)
nacks = st.lists(
    st.tuples(u63, st.integers(0, 2), st.one_of(st.none(), u32), text).map(list),
    max_size=4,
)
token = st.one_of(st.binary(min_size=16, max_size=16), st.binary(min_size=24, max_size=24))
tokens = st.lists(token, min_size=1, max_size=4)
exceptions = st.lists(st.tuples(u32, text, text, st.booleans()).map(list), max_size=4)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), text, st.binary(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=8,
)

FIELDS: dict[int, tuple[st.SearchStrategy[Any], ...]] = {
    1: (text, st.lists(u63, max_size=3), st.binary(min_size=16, max_size=16), text, st.lists(text, max_size=3),
        bindings, u32, u32),
    2: (u32, text, st.dictionaries(text, u32, max_size=3), st.booleans()),
    3: (text, text, st.booleans()),
    4: (),
    5: (),
    6: (text,),
    10: (st.lists(text, max_size=3),),
    16: (blobs,),
    17: (one_or_many, st.booleans(), exceptions),
    18: (bindings,),
    19: (),
    20: (text, u32, text),
    24: (st.integers(0, PREFETCH_MAX),),
    25: (u63, one_or_many, blobs),
    26: (ranges,),
    27: (nacks,),
    28: (ranges,),
    29: (rising,),
    32: (blobs, one_or_many, u32),
    33: (st.one_of(u63, st.lists(u63, max_size=5)), exceptions),
    34: (token, blobs),
    35: (st.integers(0, 3), tokens),
    36: (exceptions,),
    37: (one_or_many, tokens, blobs),
    48: (text, st.dictionaries(text, plain, max_size=3)),
    49: (plain,),
}  # fmt: skip


def of_number(number: int) -> st.SearchStrategy[Packet]:
    return st.tuples(u32, *FIELDS[number]).map(lambda values: SHAPES[number][0](*values))


packets: st.SearchStrategy[Packet] = st.sampled_from(sorted(FIELDS)).flatmap(of_number)


def as_fields(packet: Packet) -> list[Any]:
    return [TYPE_NUMBERS[type(packet)], *packet]


def test_every_packet_is_tested_here() -> None:
    assert set(FIELDS) == set(SHAPES)
    assert not {*range(7, 10), *range(38, 48)} & set(SHAPES), "reserved numbers"


@pytest.mark.parametrize("number", sorted(FIELDS))
def test_every_packet_survives_the_wire(number: int) -> None:
    @given(of_number(number))
    def survives(packet: Packet) -> None:
        assert Decoder(1 << 20).feed(encode_packet(packet)) == [packet]

    survives()


@given(packets, st.lists(plain, min_size=1, max_size=3))
def test_fields_of_a_later_version_are_ignored(packet: Packet, later: list[Any]) -> None:
    assert parse_packet([*as_fields(packet), *later]) == packet


@given(packets)
def test_a_missing_field_is_refused(packet: Packet) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_packet(as_fields(packet)[:-1])


@pytest.mark.parametrize("number", [0, -1, 7, 8, 9, 11, 15, 21, 38, 47, 50, 1 << 40, "4", None, 4.0, True, b"\x04"])
def test_an_unknown_number_is_refused(number: object) -> None:
    with pytest.raises(RemoteProtocolError, match="unknown packet type"):
        parse_packet([number, 1])


@pytest.mark.parametrize("request_id", [-1, 1 << 32, "1", None, 1.0, True, float("nan"), [1]])
def test_a_request_id_is_a_32_bit_number(request_id: object) -> None:
    with pytest.raises(RemoteProtocolError, match="request id"):
        parse_packet([4, request_id])


@pytest.mark.parametrize("fields", [None, 5, "x", {}, [], [4], (4, 1)])
def test_a_frame_is_a_list(fields: object) -> None:
    with pytest.raises(RemoteProtocolError, match="not a list"):
        parse_packet(fields)


GOOD = ["t", 0, "m", None, True, "latest"]


@pytest.mark.parametrize(
    ("number", "values", "field"),
    [
        (1, ["kiteq", [1], bytes(15), "g", [], [], 0, 1], "Hello.instance"),
        (1, ["kiteq", ["1"], bytes(16), "g", [], [], 0, 1], "Hello.versions"),
        (1, ["kiteq", [True], bytes(16), "g", [], [], 0, 1], "Hello.versions"),
        (1, [b"kiteq", [1], bytes(16), "g", [], [], 0, 1], "Hello.protocol"),
        (1, ["kiteq", [1], bytes(16), "g", [b"t"], [], 0, 1], "Hello.topics"),
        (1, ["kiteq", [1], bytes(16), "g", [], ["x"], 0, 1], "Hello.bindings"),
        (1, ["kiteq", [1], bytes(16), "g", [], [], -1, 1], "Hello.warm_up"),
        (1, ["kiteq", [1], bytes(16), "g", [], [], 0, None], "Hello.concurrency"),
        (1, ["k" * 4097, [1], bytes(16), "g", [], [], 0, 1], "Hello.protocol"),
        (2, [1, "b", {"a": "1"}, True], "Welcome.limits"),
        (2, [1, "b", {1: 1}, True], "Welcome.limits"),
        (3, ["code", "reason", 1], "Refusal.temporary"),
        (16, [[]], "Publish.messages"),
        (16, [["text"]], "Publish.messages"),
        (16, [b"x"], "Publish.messages"),
        (16, [[b"x"] * (FRAME_ITEMS_MAX + 1)], "Publish.messages"),
        (17, [-1, True, []], "Receipts.groups"),
        (17, [0, True, [[0, "code"]]], "Receipts.exceptions"),
        (18, [[GOOD[:5]]], "Subscribe.bindings"),
        (18, [[[*GOOD[:1], 3, *GOOD[2:]]]], "Subscribe.bindings"),
        (18, [[[*GOOD[:1], 1.0, *GOOD[2:]]]], "Subscribe.bindings"),
        (18, [[[*GOOD[:1], True, *GOOD[2:]]]], "Subscribe.bindings"),
        (18, [[[*GOOD[:3], -1, *GOOD[4:]]]], "Subscribe.bindings"),
        (24, [-1], "Credit.window"),
        (24, [PREFETCH_MAX + 1], "Credit.window"),
        (24, [True], "Credit.window"),
        (25, [-1, 1, [b"x"]], "Deliver.first_tag"),
        (26, [[1]], "Ack.ranges"),
        (26, [[2, 1]], "Ack.ranges"),
        (26, [[-1, 1]], "Ack.ranges"),
        (26, [[0, 1 << 63]], "Ack.ranges"),
        (26, [[0.0, 1]], "Ack.ranges"),
        (26, [[True, 1]], "Ack.ranges"),
        (27, [[[1, 0, None]]], "Nack.items"),
        (27, [[[-1, 0, None, ""]]], "Nack.items"),
        (27, [[[1, 3, None, ""]]], "Nack.items"),
        (27, [[[1, 0.0, None, ""]]], "Nack.items"),
        (27, [[[1, 0, -1, ""]]], "Nack.items"),
        (27, [[[1, 0, None, b""]]], "Nack.items"),
        (29, [[1, 3, 3, 4]], "Extend.ranges"),
        (29, [[5, 6, 1, 2]], "Extend.ranges"),
        (29, [[2, 1]], "Extend.ranges"),
        (48, ["stat", []], "Admin.arguments"),
        (48, ["stat", {1: 2}], "Admin.arguments"),
    ],
)
def test_a_bad_field_is_named(number: int, values: list[Any], field: str) -> None:
    with pytest.raises(RemoteProtocolError, match=field):
        parse_packet([number, 1, *values])


def test_the_text_of_an_error_is_short_whatever_the_value() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, b"x" * 1_000_000, "x" * 1_000_000, 1 << 62, None, float("nan")):
        for fields in ([value, 1], [4, value], [24, 1, value]):
            if fields == [24, 1, 1 << 62]:
                continue
            with pytest.raises(RemoteProtocolError) as refused:
                parse_packet(fields)
            assert len(str(refused.value)) < 200


def test_the_window_may_be_anything_up_to_its_limit() -> None:
    assert parse_packet([24, 1, 0]) == Credit(1, 0)
    assert parse_packet([24, 1, PREFETCH_MAX]) == Credit(1, PREFETCH_MAX)


def test_a_packet_too_large_for_a_frame_is_our_own_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(bytes):
        def __len__(self) -> int:
            return 1 << 32

    class Packer:
        def pack(self, _value: object) -> bytes:
            return Endless(b"x")

    monkeypatch.setattr(codec, "_packer", Packer())
    with pytest.raises(LocalProtocolError, match="Publish of 4294967296 bytes"):
        encode_packet(PublishPacket(1, [b"x"]))


def test_the_smallest_frame_is_seven_bytes() -> None:
    assert encode_packet(Ping(1)) == b"\x00\x00\x00\x03\x92\x04\x01"
