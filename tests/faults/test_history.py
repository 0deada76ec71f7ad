"""Histories are read back as they were written."""

from __future__ import annotations

from pathlib import Path

from tests.faults.history import History, read_histories
from tests.faults.story import consumed


def test_histories_of_several_writers_are_merged_by_time(tmp_path: Path) -> None:
    story = consumed()
    story.settle()
    story.finish()
    events = story.events
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    with History(paths[0]) as one, History(paths[1]) as two:
        for number, event in enumerate(events):
            (one if number % 2 else two).write(event)
    assert read_histories(paths) == events
