"""Bindings: what may be bound, and how a binding travels."""

from __future__ import annotations

from typing import Any

import pytest

from kiteq.binding.bindings import Binding, Kind, direct, fanout, from_wire, regex, to_wire
from kiteq.limits import NAME_LENGTH_MAX, PATTERN_LENGTH_MAX
from tests.test_message import BAD_NAMES


@pytest.mark.parametrize(
    "binding",
    [
        direct("trade", "pay-succ"),
        direct("trade", "pay-succ", watermark=1000, persistent=False, start="first"),
        regex("trade", r"pay-\w+", watermark=1),
        fanout("trade", persistent=False),
        direct("t" * NAME_LENGTH_MAX, "m" * NAME_LENGTH_MAX),
        regex("trade", "x" * PATTERN_LENGTH_MAX),
    ],
)
def test_a_binding_survives_the_wire(binding: Binding) -> None:
    assert from_wire(to_wire(binding)) == binding


def test_the_wire_form_is_six_values_in_order() -> None:
    assert to_wire(direct("trade", "pay-succ", watermark=7)) == ["trade", 0, "pay-succ", 7, True, "latest"]
    assert to_wire(regex("trade", "pay-.*", persistent=False)) == ["trade", 1, "pay-.*", None, False, "latest"]
    assert to_wire(fanout("trade", start="first")) == ["trade", 2, "*", None, True, "first"]


def test_values_after_the_sixth_are_ignored() -> None:
    assert from_wire([*to_wire(fanout("trade")), "later", 1]) == fanout("trade")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid topic"):
        fanout(name)
    with pytest.raises(ValueError, match="is not a valid message type"):
        direct("trade", name)


@pytest.mark.parametrize("pattern", ["", "x" * (PATTERN_LENGTH_MAX + 1)])
def test_a_pattern_has_1_to_256_characters(pattern: str) -> None:
    with pytest.raises(ValueError, match="1 to 256 characters"):
        regex("trade", pattern)


def test_a_wildcard_is_not_a_message_type() -> None:
    with pytest.raises(ValueError, match="is not a valid message type"):
        direct("trade", "*")


@pytest.mark.parametrize("watermark", [0, -1, 1 << 32, 1.5, float("nan"), True, "9"])
def test_a_watermark_is_a_whole_number_from_1(watermark: Any) -> None:
    with pytest.raises(ValueError, match="a watermark is"):
        fanout("trade", watermark=watermark)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"persistent": 1}, "persistent is True or False"),
        ({"start": "earliest"}, "start is 'latest' or 'first'"),
        ({"start": None}, "start is 'latest' or 'first'"),
    ],
)
def test_other_values_are_checked(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fanout("trade", **values)


@pytest.mark.parametrize("pattern", [None, b"pay", 5])
def test_a_pattern_is_a_str(pattern: Any) -> None:
    with pytest.raises(ValueError):
        regex("trade", pattern)
    with pytest.raises(ValueError):
        direct("trade", pattern)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        ["trade", 0, "pay", None, True],
        [b"trade", 0, "pay", None, True, "latest"],
        ["trade", 3, "pay", None, True, "latest"],
        ["trade", True, "pay", None, True, "latest"],
        ["trade", 1.0, "pay", None, True, "latest"],
        ["trade", 0, "pay", "x", True, "latest"],
        ["trade", 0, "pay", None, 1, "latest"],
        ["trade", 0, "pay", None, True, None],
        ["trade", 2, "pay", None, True, "latest"],
    ],
)
def test_a_broken_list_is_refused(fields: list[object]) -> None:
    with pytest.raises(ValueError):
        from_wire(fields)


def test_a_binding_reads_like_its_constructor() -> None:
    assert str(direct("trade", "pay")) == "direct('trade', 'pay')"
    assert Kind(1) is Kind.REGEX
