"""KiteQ's spelling of flags."""

from __future__ import annotations

import pytest

from kiteq.cli.arguments import with_two_dashes


@pytest.mark.parametrize(
    ("words", "rewritten"),
    [
        (["-bind=h:1", "-topics=a,b"], ["--bind=h:1", "--topics=a,b"]),
        (["-bind", "h:1", "-db", "memory://"], ["--bind", "h:1", "--db", "memory://"]),
        (["--bind", "h:1", "-insecure", "-store-limit=1GiB"], ["--bind", "h:1", "--insecure", "--store-limit=1GiB"]),
        (["-topics", "-bind"], ["--topics", "-bind"]),
        (["send", "a", "b", "-bind"], ["send", "a", "b", "-bind"]),
        (["-insecure", "send", "-db"], ["--insecure", "send", "-db"]),
        (["-version"], ["--version"]),
        (["-h"], ["-h"]),
        ([], []),
    ],
)
def test_flags_of_the_broker_get_two_dashes_and_nothing_else_does(words: list[str], rewritten: list[str]) -> None:
    assert with_two_dashes(words) == rewritten
