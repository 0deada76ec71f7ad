"""Pages of `kiteq top`: functions of a sample and of the room there is."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kiteq.cli.page import page
from kiteq.cli.samples import sample
from tests.cli.sights import group, lost, overview, seen, topic


def told(topics: int = 2, groups: int = 2, brokers: int = 1, **more: Any) -> dict[str, Any]:
    topic_rows = tuple(topic(f"t{number}", pending=topics - number) for number in range(topics))
    group_rows = tuple(group(f"g{number}", pending=groups - number) for number in range(groups))
    first = overview("a", 2.0, topic_rows, group_rows, **more)
    return sample(None, seen(1_700_000_000_000, first, *(lost(f"b{n}:1", 75.0) for n in range(1, brokers))))


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return re.split(" {2,}", line)


def test_a_page_has_all_figures() -> None:
    before = seen(0, overview("a", 1.0, (topic("t"),), (group("g"),)))
    now = overview(
        "a", 2.0, (topic("t", **{"in": 2_000, "out": 3}, pending=4, pending_bytes=1_536, oldest_age_s=65, dead=7),),
        (group("g", in_flight=2, retrying=1, out=3, pending=4, pending_bytes=1_536),),
        accepted=2_000, acked=3, pending=4, retrying=1, dead=7, delayed=1_000, unrouted_bytes=5,
        transactions={"open": 3, "parked": 1, "oldest_age_s": 3_700},
        registry={"degraded": True, "since_s": 61.5, "found": False, "reason": "no connection"},
        state="degraded", reasons=["the registry, for 61s"],
    )  # fmt: skip
    text = page(sample(before, seen(1_700_000_000_000, now, lost("b:1", 75.0))), "zk://h\x1b")
    lines = text.splitlines()
    assert lines[0] == "kiteq top  2023-11-14 22:13:20 UTC  brokers: 1 degraded, 1 not reached  zk://h\\x1b"
    assert lines[1] == (
        "messages: in 2,000/s, out 3.0/s, pending 4, retrying 1, dead letters 7, delayed 1,000, unrouted 5B"
    )
    assert lines[2] == "transactions: open 3, parked 1, the oldest 1h 1m old"
    assert cells(text, "a:1") == [
        "a:1", "degraded", "2,000", "3.0", "not found, 1m 1s", "1", "2m 5s", "3", "3MiB of 64GiB",
        "the registry, for 61s",
    ]  # fmt: skip
    assert cells(text, "b:1")[:3] == ["b:1", "not reached, 1m 15s", "-"]
    assert cells(text, "b:1")[-1] == "no broker answers at b:1"
    assert cells(text, "t ") == ["t", "2,000", "3.0", "4", "1.5KiB", "1m 5s", "0", "7"]
    assert cells(text, "g ") == ["g", "1", "4", "1.5KiB", "2", "1", "0", "3.0"]


def test_without_a_rate_and_without_transactions_it_says_so() -> None:
    text = page(told(1, 1), "h:1")
    assert "messages: in -/s, out -/s," in text
    assert "transactions: open 0, parked 0\n" in text
    assert cells(text, "a:1")[4] == "embedded"


@pytest.mark.parametrize("lines", [*range(1, 40), 100])
@pytest.mark.parametrize(("topics", "groups", "brokers"), [(0, 0, 1), (2, 50, 3), (50, 2, 1), (50, 50, 30)])
def test_a_page_never_has_more_lines_than_the_terminal(topics: int, groups: int, brokers: int, lines: int) -> None:
    text = page(told(topics, groups, brokers), "h:1", columns=60, lines=lines)
    assert len(text.splitlines()) <= lines
    assert max(map(len, text.splitlines())) <= 60


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 120, 200])
def test_a_figure_is_whole_or_left_out(columns: int) -> None:
    name = "orders-of-the-" + "very-" * 20 + "end"
    counts = {"in": 1_234_567, "out": 1_234_567}
    topics, groups = (topic(name, pending=1_234_567, **counts),), (group(name, pending=1_234_567, out=1_234_567),)
    before = seen(0, overview("a", 1.0, (topic(name),), (group(name),)))
    now = overview("a", 2.0, topics, groups, accepted=1_234_567, acked=1_234_567, pending=1_234_567, delayed=1_234_567)
    shown = sample(before, seen(1_700_000_000_000, now, lost("broker-1.example.internal:13800", 7_500.0)))
    whole, text = (page(shown, "zk://h", columns=width).splitlines() for width in (None, columns))
    assert max(map(len, text)) <= columns
    told_whole = {figure for line in whole for figure in line.split()}
    for line in text[1:]:
        for figure in line.split():
            is_name = figure.startswith(("orders-", "broker-1")) and figure.endswith(("end", ":13800"))
            assert is_name or figure in told_whole
    assert columns < 80 or sum("1,234,567" in line for line in text) >= 4


def test_what_does_not_fit_is_counted() -> None:
    text = page(told(30, 40), "h:1", lines=30)
    parts = text.split("\n\n")
    for part, count in ((parts[2], 30), (parts[3], 40)):
        *rows, last = part.splitlines()[1:]
        assert last == f"... {count - len(rows)} more"
        assert len(rows) >= 8
    assert "more" not in page(told(30, 40), "h:1", lines=100)


def test_a_small_table_leaves_its_room_to_the_other() -> None:
    assert "more" not in page(told(1, 16), "h:1", lines=28)
    assert "more" not in page(told(16, 1), "h:1", lines=28)


def test_brokers_that_are_not_well_are_shown_before_there_is_no_room_for_others() -> None:
    many = sample(None, seen(0, *(overview(f"a{n:02}", 1.0) for n in range(30)), lost("z:1", 5.0)))
    text = page(many, "h:1", lines=24)
    assert text.splitlines()[5].startswith("z:1")
    assert "... 25 more" in text


@pytest.mark.parametrize("lines", [None, 24])
def test_what_the_brokers_left_out_is_counted_too(lines: int | None) -> None:
    text = page(told(1, 1, topic_count=4, group_count=11), "h:1", lines=lines)
    assert "t0" in text
    assert "... 3 more" in text
    assert "... 10 more" in text
