"""What people and programs read."""

from __future__ import annotations

import json

import pytest

from kiteq.cli.output import print_json, printable, table, time_text


def test_numbers_stand_to_the_right_and_text_to_the_left() -> None:
    assert table(("NAME", "COUNT"), [("a", 5), ("longer", 12_345)]) == "NAME    COUNT\na           5\nlonger  12345"


def test_a_cell_cannot_break_the_table_or_steer_the_terminal() -> None:
    assert table(("ERROR",), [("two\nlines\x1b[2J",)]) == "ERROR\ntwo lines\\x1b[2J"


def test_a_body_cannot_steer_the_terminal() -> None:
    assert printable("é\n\ta\x1b]0;x\x07\x9b".encode() + b"\xff") == "é\n\ta\\x1b]0;x\\x07\\x9b\\xff"


def test_json_gives_bytes_as_text_or_base64(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"good": b"abc", "other": b"\xff"})
    assert json.loads(capsys.readouterr().out) == {"good": {"text": "abc"}, "other": {"base64": "/w=="}}


def test_times_are_shown_in_utc() -> None:
    assert time_text(1_700_000_000_000) == "2023-11-14 22:13:20"
