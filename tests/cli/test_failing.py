"""Which errors end as a sentence, and with which status."""

from __future__ import annotations

from kiteq.cli.failing import CommandFailed, sentence_and_status
from kiteq.errors import ConfigError, Refused


def test_a_wrong_setting_ends_with_2_and_what_the_world_refuses_with_1() -> None:
    assert sentence_and_status(ConfigError("bad")) == ("bad", 2)
    assert sentence_and_status(CommandFailed("no", 2)) == ("no", 2)
    assert sentence_and_status(Refused("code", "reason")) == ("reason [code]", 1)
    assert sentence_and_status(OSError(98, "cannot listen")) == ("cannot listen", 1)
    assert sentence_and_status(OSError(13, "Permission denied", "x")) == ("Permission denied: x", 1)


def test_a_group_of_one_error_is_that_error() -> None:
    assert sentence_and_status(ExceptionGroup("g", [ExceptionGroup("h", [ConfigError("bad")])])) == ("bad", 2)


def test_a_defect_keeps_its_traceback() -> None:
    assert sentence_and_status(RuntimeError("x")) is None
    assert sentence_and_status(ExceptionGroup("g", [ConfigError("a"), ConfigError("b")])) is None
