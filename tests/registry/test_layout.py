"""The nodes of the registry: their paths and their content, byte by byte."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kiteq.binding.bindings import direct, fanout, regex
from kiteq.message import check_name
from kiteq.registry.layout import (
    EVERY_TOPIC,
    NODE_BYTES_MAX,
    Entry,
    Server,
    bindings_path,
    decode_entries,
    decode_server,
    encode_entries,
    encode_server,
    entry,
    group_of,
    publisher_path,
    server_path,
)  # fmt: skip

BINDING: dict[str, Any] = {
    "groupId": "g", "topic": "trade", "messageType": "pay", "bindType": 0, "watermark": 0, "persistent": True,
    "version": "1.0.0",
}  # fmt: skip


def test_the_paths() -> None:
    assert server_path("trade", "10.0.0.1:13800") == "/kiteq/server/trade/10.0.0.1:13800"
    assert publisher_path("trade", "g", "[::1]:5") == "/kiteq/pub/trade/g/[::1]:5"
    assert bindings_path("trade", "g") == "/kiteq/sub/trade/g-bind"
    assert group_of("my-bind-bind") == "my-bind"
    assert group_of("other") is None


def test_the_name_for_every_topic_is_no_topic() -> None:
    with pytest.raises(ValueError, match="not a valid topic"):
        check_name("topic", EVERY_TOPIC)


def test_a_server_says_who_it_is() -> None:
    server = Server("b1", 3, 1, (0, 2))
    assert json.loads(encode_server(server)) == {
        "brokerId": "b1", "epoch": 3, "wireVersion": 1, "partitions": [0, 2],
    }  # fmt: skip
    assert decode_server(encode_server(server)) == server
    assert decode_server(b'{"brokerId":"b1","epoch":3,"wireVersion":1,"later":[]}') == Server("b1", 3, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"[]", b"null", b"{}", b'{"brokerId":1,"epoch":3,"wireVersion":1}',
        b'{"brokerId":"","epoch":3,"wireVersion":1}', b'{"brokerId":"b","epoch":-3,"wireVersion":1}',
        b'{"brokerId":"\\ud800","epoch":3,"wireVersion":1}', b'{"brokerId":"\\u001b[31m","epoch":3,"wireVersion":1}',
        b'{"brokerId":"b","epoch":3}', b'{"brokerId":"b","epoch":3.5,"wireVersion":1}',
        b'{"brokerId":"b","epoch":true,"wireVersion":1}',
        b'{"brokerId":"b","epoch":3,"wireVersion":1,"partitions":[-1]}',
        b'{"brokerId":"b","epoch":3,"wireVersion":1,"partitions":3}', b"[" * 100_000, b" " * (NODE_BYTES_MAX + 1),
    ],
)  # fmt: skip
def test_another_server_is_malformed(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"it |is not"):
        decode_server(content)


def test_bindings_have_the_field_names_of_kiteq() -> None:
    content = encode_entries(
        [
            entry("g", direct("trade", "pay", watermark=9, start="first")),
            entry("g", regex("trade", "pay-.*", persistent=False)),
            entry("g", fanout("trade")),
        ]
    )
    assert json.loads(content) == [
        BINDING | {"watermark": 9},
        BINDING | {"bindType": 1, "messageType": "pay-.*", "persistent": False},
        BINDING | {"bindType": 2, "messageType": "*"},
    ]
    assert [one.binding for one in decode_entries("trade", "g", content)] == [
        direct("trade", "pay", watermark=9),
        regex("trade", "pay-.*", persistent=False),
        fanout("trade"),
    ]


def test_fields_of_a_later_version_survive() -> None:
    content = json.dumps([BINDING | {"later": {"x": "\ud800"}}]).encode()
    (found,) = decode_entries("trade", "g", content)
    assert found == Entry(direct("trade", "pay"), BINDING | {"later": {"x": "\ud800"}})
    assert json.loads(encode_entries([found])) == json.loads(content)


def test_what_kiteq_writes_without_a_limit_is_no_limit() -> None:
    for fields in (BINDING | {"watermark": -1}, {name: BINDING[name] for name in BINDING if name != "watermark"}):
        (found,) = decode_entries("trade", "g", json.dumps([fields]).encode())
        assert found.binding.watermark is None


@pytest.mark.parametrize(
    "fields",
    [
        {"groupId": "other"}, {"topic": "other"}, {"topic": None}, {"bindType": 3}, {"bindType": True},
        {"bindType": "0"},
        {"messageType": 5}, {"messageType": "*"}, {"persistent": 1}, {"persistent": None}, {"watermark": "5"},
        {"watermark": 1 << 40}, {"bindType": 1, "messageType": ""},
    ],
)  # fmt: skip
def test_another_binding_is_malformed_and_named_by_its_place(fields: dict[str, Any]) -> None:
    content = json.dumps([BINDING, BINDING | fields]).encode()
    with pytest.raises(ValueError, match="binding 2: "):
        decode_entries("trade", "g", content)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"[[]]", b"null", b"[" * 100_000, b"[" + b"1," * 10_001 + b"1]"]
)
def test_something_else_than_a_list_of_bindings_is_malformed(content: bytes) -> None:
    with pytest.raises(ValueError, match="it is not"):
        decode_entries("trade", "g", content)


def test_too_many_bindings_are_refused() -> None:
    entries = [entry("g", direct("trade", f"{number:0200}")) for number in range(2_000)]
    with pytest.raises(ValueError, match="at most"):
        encode_entries(entries)


@pytest.mark.parametrize("group", ["", "two words", "g" * 256])
def test_a_node_whose_group_no_client_can_have_is_malformed(group: str) -> None:
    with pytest.raises(ValueError, match="group"):
        decode_entries("trade", group, encode_entries([entry(group, direct("trade", "pay"))]))
