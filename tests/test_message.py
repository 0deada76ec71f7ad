"""A message: its values, its encoding, and what is not a message."""

from __future__ import annotations

import os
import struct
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from zlib import crc32

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq import message as module
from kiteq.errors import MessageTooLarge, Refused
from kiteq.limits import BODY_BYTES_MAX_CEILING, DELAY_MS_MAX, NAME_LENGTH_MAX, PROPERTIES_MAX, TTL_MS_MAX
from kiteq.message import (
    CRC_RESIDUE,
    FLAG_FLY,
    FLAG_TEXT,
    BadMessage,
    Message,
    check_name,
    decode,
    encode,
    new_id,
    parse_extras,
    parse_head,
    refuse_too_large,
    split,
)

BAD_NAMES = (
    "", "x" * 256, "../etc", "/", "a/b", "%00", "a\0", "a\r\nb", "a\n", "\x1b[31m", "\u202eabc", "\u0430bc", "*", "#",
    "a*", ".hidden", "-x", " a", "a ", "caf\u00e9", "\ud800",
)  # fmt: skip
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._:@+-]{0,20}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    fly = draw(st.booleans())
    when = draw(st.sampled_from(["at once", "delay", "deliver at"])) if not fly else "at once"
    ms = draw(st.integers(0, DELAY_MS_MAX))
    return Message(
        draw(names),
        draw(names),
        draw(st.one_of(st.binary(max_size=200), texts)),
        properties=draw(st.dictionaries(texts, texts, max_size=4)),
        ttl=draw(st.one_of(st.none(), st.integers(1, TTL_MS_MAX).map(lambda ms: ms / 1000))),
        deliver_limit=draw(st.integers(1, 100)),
        delay=ms / 1000 if when == "delay" else None,
        deliver_at=50 * ms / 1000 if when == "deliver at" else None,
        key=None if fly else draw(st.one_of(st.none(), names)),
        fly=fly,
    )


@given(messages(), st.integers(1, 100))
def test_a_message_survives_its_encoding(message: Message, attempt: int) -> None:
    received = decode(message.encoded(), "members", attempt)
    for name in (
        "topic",
        "message_type",
        "body",
        "id",
        "key",
        "delay",
        "deliver_at",
        "deliver_limit",
        "fly",
        "text_sent",
    ):
        assert getattr(received, name) == getattr(message, name), name
    assert dict(received.properties) == dict(message.properties)
    assert received.ttl == (TTL_MS_MAX / 1000 if message.ttl is None else message.ttl)
    assert (received.group, received.attempt) == ("members", attempt)
    assert received.encoded()[:16] == message.id, "what was received may be sent on"


@given(messages(), st.data())
def test_a_flipped_bit_is_noticed(message: Message, data: st.DataObject) -> None:
    blob = bytearray(message.encoded())
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BadMessage, match="checksum"):
        decode(bytes(blob), "g", 1)


def test_every_flipped_byte_is_noticed() -> None:
    blob = Message("trade", "pay", b"body", properties={"a": "b"}).encoded()
    for place in range(len(blob)):
        broken = blob[:place] + bytes([blob[place] ^ 0xFF]) + blob[place + 1 :]
        with pytest.raises(BadMessage, match="checksum"):
            decode(broken, "g", 1)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_bad_message_even_with_a_good_checksum(content: bytes) -> None:
    blob = content + struct.pack("<I", crc32(content))
    assert crc32(blob) == CRC_RESIDUE
    try:
        decode(blob, "g", 1)
    except BadMessage as bad:
        assert bad.code  # noqa: PT017 a message by chance is as good


@given(messages(), st.data())
def test_a_message_cut_short_is_refused(message: Message, data: st.DataObject) -> None:
    blob = message.encoded()
    content = blob[: data.draw(st.integers(0, len(blob) - 5))]
    cut = content + struct.pack("<I", crc32(content))
    body_at = split(blob)[2]
    if len(content) < body_at:
        with pytest.raises(BadMessage, match="cut short"):
            decode(cut, "g", 1)
    else:
        assert message.body.startswith(decode(cut, "g", 1).body)


def test_the_encoding_is_the_documented_one() -> None:
    message = Message("trade", "pay", "hi", id="00112233445566778899aabbccddeeff", ttl=60, deliver_limit=5, fly=True)
    blob = message.encoded()
    assert blob[:16].hex() == "00112233445566778899aabbccddeeff"
    assert blob[16:20] == struct.pack(">I", crc32(b"hi"))
    head = msgpack.packb(["trade", "pay", 60_000, 5, FLAG_TEXT | FLAG_FLY])
    assert blob[28:30] == struct.pack(">H", len(head))
    assert blob[30:] == head + b"\0\0hi" + struct.pack("<I", crc32(blob[:-4]))
    assert split(blob) == (head, b"", 30 + len(head) + 2)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid thing"):
        check_name("thing", name)
    with pytest.raises(ValueError, match="is not a valid topic"):
        Message(name, "pay").encoded()


@pytest.mark.parametrize("name", ["a", "_", "9", "a.b:c@d+e-f", "x" * NAME_LENGTH_MAX])
def test_a_good_name_is_accepted(name: str) -> None:
    assert check_name("thing", name) == name


@pytest.mark.parametrize("name", [None, b"a", 5])
def test_a_name_is_a_str(name: object) -> None:
    with pytest.raises(ValueError, match="must be a str"):
        check_name("thing", name)


def test_a_forked_process_does_not_make_the_ids_of_its_parent() -> None:
    new_id()  # the numbers for more are fetched now
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"".join(new_id()[8:] for _ in range(10)))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 1000)
    os.close(reading)
    os.close(writing)
    assert not {theirs[at : at + 8] for at in range(0, 80, 8)} & {new_id()[8:] for _ in range(10)}


def test_a_new_id_is_a_uuid_of_version_7() -> None:
    first, second = new_id(), new_id()
    assert first != second
    assert first[6] >> 4 == 7
    assert first[8] >> 6 == 2
    assert abs(int.from_bytes(second[:6], "big") - int.from_bytes(first[:6], "big")) < 60_000


@pytest.mark.parametrize("id_", [b"short", "00", "zz" * 16, 5, bytearray(16)])
def test_a_bad_id_is_refused(id_: Any) -> None:
    with pytest.raises(ValueError, match="message id"):
        Message("t", "m", id=id_)


def test_an_id_is_also_taken_as_a_uuid_text() -> None:
    assert Message("t", "m", id="00112233-4455-6677-8899-aabbccddeeff").id[:2] == b"\x00\x11"


@pytest.mark.parametrize("body", [None, 5, bytearray(b"x"), ["x"]])
def test_a_body_is_bytes_or_text(body: Any) -> None:
    with pytest.raises(ValueError, match="a body must be"):
        Message("t", "m", body)


@pytest.mark.parametrize(
    "values",
    [
        *({"ttl": value} for value in (0, -1, 0.0004, TTL_MS_MAX / 1000 + 1, float("nan"), float("inf"), "5")),
        *({"deliver_limit": value} for value in (0, 101, -1, 2.5, "5", None)),
        *({"delay": value} for value in (-1, 2.0**63, float("nan"), float("inf"), "5", DELAY_MS_MAX / 1000 + 0.001)),
        *({"deliver_at": value} for value in (-1, 2.0**63, float("nan"), float("inf"), "5", True)),
        {"deliver_at": time.time() * 1000},
        {"deliver_at": datetime.now()},  # noqa: DTZ005 what is refused
        {"key": "a b"},
        {"properties": {"a": 1}},
        {"properties": {1: "a"}},
        {"properties": {str(number): "" for number in range(PROPERTIES_MAX + 1)}},
        {"properties": {"a": "x" * 65_536}},
        {"properties": {"a": "\ud800"}},
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Message("t", "m", **values).encoded()


def test_a_fly_message_is_neither_delayed_nor_ordered() -> None:
    with pytest.raises(ValueError, match="neither delay nor key"):
        Message("t", "m", fly=True, delay=1)
    with pytest.raises(ValueError, match="neither delay nor key"):
        Message("t", "m", fly=True, deliver_at=1)
    with pytest.raises(ValueError, match="neither delay nor key"):
        Message("t", "m", fly=True, key="k")


def test_a_delay_and_a_time_to_deliver_at_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give delay or deliver_at, not both"):
        Message("t", "m", delay=0, deliver_at=1)


def test_a_time_to_deliver_at_is_taken_with_any_time_zone_and_refused_without() -> None:
    noon = datetime(2026, 11, 21, 12, tzinfo=UTC)
    east = noon.astimezone(timezone(timedelta(hours=8)))
    assert Message("t", "m", deliver_at=noon).deliver_at == noon.timestamp()
    assert Message("t", "m", deliver_at=east).deliver_at == noon.timestamp()
    with pytest.raises(ValueError, match="deliver_at needs a time zone: 2026-11-21T12:00:00 is another moment in each"):
        Message("t", "m", deliver_at=noon.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("seconds", "ms"), [(0, 0), (0.0001, 1), (0.001, 1), (0.0011, 2), (0.007, 7), (1.001, 1_001), (2.3, 2_300)]
)
def test_a_time_between_two_milliseconds_is_the_later_one(seconds: float, ms: int) -> None:
    delayed, dated = Message("t", "m", delay=seconds), Message("t", "m", deliver_at=seconds)
    assert parse_extras(split(delayed.encoded())[1]) == ({}, None, ms, None)
    assert parse_extras(split(dated.encoded())[1]) == ({}, None, None, ms)


def test_extras_have_a_fourth_item_only_with_a_time_to_deliver_at() -> None:
    assert split(Message("t", "m", delay=2).encoded())[1] == msgpack.packb([{}, None, 2_000])
    assert split(Message("t", "m", deliver_at=2).encoded())[1] == msgpack.packb([{}, None, None, 2_000])
    assert split(Message("t", "m").encoded())[1] == b""


def test_a_body_over_the_ceiling_is_refused() -> None:
    with pytest.raises(MessageTooLarge):
        encode(Message("t", "m", bytes(BODY_BYTES_MAX_CEILING + 1)))
    refused = refuse_too_large(11, 10)
    assert isinstance(refused, Refused)
    assert refused.code == "message_too_large"


def test_the_text_of_a_body_and_what_is_shown() -> None:
    message = Message("t", "m", "grüße", id=bytes(16))
    assert message.text == "grüße"
    assert repr(message) == f"Message('t', 'm', id={'00' * 16})"
    assert message.encoded() is message.encoded()


def nested(depth: int) -> bytes:
    return b"\x91" * depth + b"\x01"


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"", "bad_message"),
        (b"\xc1", "bad_message"),
        (msgpack.packb(5), "bad_message"),
        (msgpack.packb(["t", "m", 1, 1]), "bad_message"),
        (msgpack.packb(["t", "m", 1, 1, 0]) + b"x", "bad_message"),
        (msgpack.packb(["t", "m", 1, 1, 4]), "bad_message"),
        (msgpack.packb(["t", "m", 1, 1, -1]), "bad_message"),
        (msgpack.packb(["t", "m", 1, 1, True]), "bad_message"),
        (msgpack.packb(["", "m", 1, 1, 0]), "bad_name"),
        (msgpack.packb(["t", b"m", 1, 1, 0]), "bad_name"),
        (msgpack.packb(["t", "m", 0, 1, 0]), "bad_limit"),
        (msgpack.packb(["t", "m", TTL_MS_MAX + 1, 1, 0]), "bad_limit"),
        (msgpack.packb(["t", "m", float("nan"), 1, 0]), "bad_limit"),
        (msgpack.packb(["t", "m", 1, 0, 0]), "bad_limit"),
        (msgpack.packb(["t", "m", 1, 101, 0]), "bad_limit"),
        (msgpack.packb(["t", "m", 1, True, 0]), "bad_limit"),
        (msgpack.packb(["t", "m", msgpack.Timestamp(1), 1, 0]), "bad_limit"),
        (b"\x95\xa1t\xa1m" + nested(1000) + b"\x01\x00", "bad_limit"),
        (b"\x95\xa1t\xa1m\x01" + nested(1000) + b"\x00", "bad_limit"),
        (b"\x95\xa1t\xa1m\x01\x01" + nested(1000), "bad_message"),
        (b"\x95\xa1t\xa1m" + nested(10_000) + b"\x01\x00", "bad_message"),
        (b"\x95\xa1\xff\xa1m\x01\x01\x00", "bad_message"),
        (b"\xdd\xff\xff\xff\xff", "bad_message"),
    ],
)
def test_a_bad_head_is_refused(head: bytes, code: str) -> None:
    with pytest.raises(BadMessage) as bad:
        parse_head(head)
    assert bad.value.code == code
    assert len(bad.value.reason) < 400


@pytest.mark.parametrize(
    ("extras", "code"),
    [
        (b"\xc1", "bad_message"),
        (msgpack.packb([{}, None]), "bad_message"),
        (msgpack.packb([[], None, None]), "bad_properties"),
        (msgpack.packb([{"a": 1}, None, None]), "bad_properties"),
        (msgpack.packb([{b"a": "b"}, None, None]), "bad_properties"),
        (msgpack.packb([{5: "b"}, None, None]), "bad_message"),
        (msgpack.packb([{str(n): "" for n in range(129)}, None, None]), "bad_properties"),
        (msgpack.packb([{}, "a b", None]), "bad_name"),
        (msgpack.packb([{}, 5, None]), "bad_name"),
        (msgpack.packb([{}, None, -1]), "bad_limit"),
        (msgpack.packb([{}, None, True]), "bad_limit"),
        (msgpack.packb([{}, None, 1 << 63]), "bad_limit"),
    ],
)
def test_bad_extras_are_refused(extras: bytes, code: str) -> None:
    with pytest.raises(BadMessage) as bad:
        parse_extras(extras)
    assert bad.value.code == code


def test_later_fields_of_head_and_extras_are_ignored() -> None:
    assert parse_head(msgpack.packb(["t", "m", 1, 2, 0, "later"])).deliver_limit == 2
    assert parse_extras(msgpack.packb([{"a": "b"}, "k", 5, None, "later"])) == ({"a": "b"}, "k", 5, None)
    assert parse_extras(b"") == ({}, None, None, None)


def test_ten_thousand_kinds_of_messages_do_not_fill_memory() -> None:
    for number in range(module._HEADS_CACHED_MAX + 2):
        sent = Message("t", f"m{number}", b"x")
        assert decode(sent.encoded(), "g", 1).message_type == sent.message_type
    assert len(module._heads) <= module._HEADS_CACHED_MAX
    assert len(module._known_heads) <= module._HEADS_CACHED_MAX


def test_a_long_bad_name_is_shown_short() -> None:
    with pytest.raises(ValueError, match=r"'x{61}\.\.\.' is not a valid topic"):
        check_name("topic", "x" * 100_000)
