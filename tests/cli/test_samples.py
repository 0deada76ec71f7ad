"""What two looks at the brokers tell, without a broker."""

from __future__ import annotations

import json

from kiteq.cli.samples import sample
from tests.cli.sights import group, lost, overview, seen, topic


def test_the_first_look_knows_no_rate() -> None:
    told = sample(None, seen(1_000, overview("a", 5.0, (topic("t", **{"in": 7}),), (group("g"),), accepted=7)))
    assert told["interval_s"] is None
    assert told["totals"]["in_per_s"] is told["totals"]["out_per_s"] is None
    assert told["brokers"][0]["in_per_s"] is told["topics"][0]["in_per_s"] is told["groups"][0]["out_per_s"] is None


def test_rates_count_by_the_clock_of_each_broker_and_are_summed() -> None:
    before = seen(
        0,
        overview("a", 10.0, (topic("t", **{"in": 100, "out": 50}),), (group("g", out=50),), accepted=100, acked=50),
        overview("b", 70.0, (topic("t", **{"in": 5}),), (), accepted=5),
    )
    now = seen(
        2_000,
        overview("a", 12.0, (topic("t", **{"in": 120, "out": 54}),), (group("g", out=54),), accepted=120, acked=54),
        overview("b", 74.0, (topic("t", **{"in": 9}),), (), accepted=9),
    )
    told = sample(before, now)
    assert told["interval_s"] == 2.0
    assert [(row["in_per_s"], row["out_per_s"]) for row in told["brokers"]] == [(10.0, 2.0), (1.0, 0.0)]
    (row,) = told["topics"]
    assert (row["in_per_s"], row["out_per_s"]) == (11.0, 2.0)
    assert told["groups"][0]["out_per_s"] == 2.0
    assert (told["totals"]["in_per_s"], told["totals"]["out_per_s"]) == (11.0, 2.0)


def test_a_broker_that_was_started_again_has_no_rate_yet() -> None:
    before = seen(0, overview("a", 10.0, (topic("t", **{"in": 100}),), accepted=100))
    for now in (
        overview("a", 1.0, (topic("t", **{"in": 3}),), accepted=3, epoch=2),
        overview("a", 12.0, (topic("t", **{"in": 300}),), accepted=300, epoch=2),
    ):
        told = sample(before, seen(1_000, now))
        assert told["brokers"][0]["in_per_s"] is told["topics"][0]["in_per_s"] is told["totals"]["in_per_s"] is None


def test_what_is_new_began_at_nothing_and_what_began_anew_counts_from_there() -> None:
    before = seen(0, overview("a", 10.0, (topic("t", out=90),), ()))
    now = seen(1_000, overview("a", 11.0, (topic("t", out=4), topic("u", **{"in": 6})), (group("g", out=8),)))
    told = sample(before, now)
    assert {row["topic"]: (row["in_per_s"], row["out_per_s"]) for row in told["topics"]} == {
        "t": (0.0, 4.0),
        "u": (6.0, 0.0),
    }
    assert told["groups"][0]["out_per_s"] == 8.0


def test_what_was_left_out_a_moment_ago_has_no_rate() -> None:
    before = seen(0, overview("a", 10.0, (topic("t"),), (), topic_count=5))
    now = seen(1_000, overview("a", 11.0, (topic("t"), topic("u", **{"in": 10**9})), (), topic_count=5, group_count=3))
    told = sample(before, now)
    assert {row["topic"]: row["in_per_s"] for row in told["topics"]} == {"t": 0.0, "u": None}
    assert told["left_out"] == {"topics": 3, "groups": 3}


def test_figures_are_summed_and_ages_are_the_oldest() -> None:
    one = overview(
        "a", 1.0, (topic("t", pending=3, pending_bytes=30, oldest_age_s=5),), (group("g", pending=3, in_flight=1),),
        pending=3, dead=2, delayed=1, unrouted_bytes=10, transactions={"open": 2, "parked": 1, "oldest_age_s": 9},
    )  # fmt: skip
    other = overview(
        "b", 1.0, (topic("t", pending=4, retrying=2, oldest_age_s=7),), (group("g", pending=4, dead=6),),
        pending=4, retrying=2, transactions={"open": 1, "parked": 0, "oldest_age_s": None},
    )  # fmt: skip
    told = sample(None, seen(0, one, other))
    (row,) = told["topics"]
    assert (row["pending"], row["pending_bytes"], row["retrying"], row["oldest_age_s"]) == (7, 30, 2, 7)
    (row,) = told["groups"]
    assert (row["connections"], row["pending"], row["in_flight"], row["dead"]) == (2, 7, 1, 6)
    assert told["transactions"] == {"open": 3, "parked": 1, "oldest_age_s": 9}
    assert told["totals"] == {
        "in_per_s": None, "out_per_s": None, "pending": 7, "retrying": 2, "dead": 2, "delayed": 1, "unrouted_bytes": 10,
    }  # fmt: skip


def test_a_broker_that_is_not_reached_tells_why_and_since_when_and_changes_nothing_else() -> None:
    told = sample(seen(0, overview("a", 1.0)), seen(1_000, overview("a", 2.0), lost("b:1", 12.34)))
    row = told["brokers"][1]
    assert (row["address"], row["state"], row["lost_s"]) == ("b:1", "not reached", 12.3)
    assert row["reasons"] == ["no broker answers at b:1"]
    assert row["epoch"] is row["in_per_s"] is row["registry"] is None
    assert told["brokers"][0].keys() == row.keys()
    assert told["totals"]["in_per_s"] == 0.0


def test_nobody_there_is_a_sample_too() -> None:
    told = sample(None, seen(0, lost("a:1", 1.0)))
    assert (told["topics"], told["groups"], told["totals"]["pending"]) == ([], [], 0)
    json.dumps(told)


def test_most_waiting_comes_first_then_the_busiest_then_the_name() -> None:
    rows = (
        topic("idle"), topic("busy", **{"in": 9}), topic("also-idle"), topic("behind", pending=1),
        topic("failing", retrying=2),
    )  # fmt: skip
    told = sample(seen(0, overview("a", 1.0)), seen(1_000, overview("a", 2.0, rows)))
    assert [row["topic"] for row in told["topics"]] == ["failing", "behind", "busy", "also-idle", "idle"]
