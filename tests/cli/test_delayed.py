"""Delayed messages from the command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.cli.running import listening, refused, run
from tests.support.broker import BrokerProcess

ID = "00112233445566778899aabbccddeeff"


@pytest.mark.slow
def test_a_message_is_sent_for_later_and_cancelled(broker: BrokerProcess) -> None:
    with listening(broker, "trade", "--count", "1") as listener:
        at = (datetime.now(UTC) + timedelta(days=1)).isoformat()
        said = run(broker, "send", "trade", "pay", "tomorrow", "--deliver-at", at)
        assert re.fullmatch("stored until its time comes: id=[0-9a-f]{32}\n", said)
        later = said.partition("id=")[2].strip()
        soon = run(broker, "send", "trade", "pay", "soon", "--delay", "300ms", "--id", ID)
        assert soon == f"stored until its time comes: id={ID}\n"
        printed, _ = listener.communicate(timeout=20)
        assert printed == f"trade pay {ID}: soon\n"
    assert run(broker, "msg", "cancel", later) == "cancelled: 1\n"
    assert "no message" in refused(broker.folder, "msg", "cancel", later, "--broker", broker.address, status=1)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--delay", "soon"), "--delay is 'soon'; it must be a time from 0s to 366d, like 90s"),
        (("--deliver-at", "soon"), "--deliver-at is 'soon'; it must be a date and time, like 2030-12-24T18:00"),
        (("--deliver-at", "2999-01-01"), "deliver_at must be at most 366 days ahead"),
        (("--delay", "1s", "--deliver-at", "2030-12-24T18:00"), "give delay or deliver_at, not both"),
        (("--delay", "1s", "--fly"), "a fly message has neither delay nor key"),
    ],
)
def test_a_wrong_time_is_one_sentence(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    assert refused(tmp_path, "send", "a", "t", *words, status=2).startswith(sentence)
