"""Which message types a binding takes, and which bindings of a group go together."""

from __future__ import annotations

from time import perf_counter

import pytest

from kiteq.binding.bindings import Binding, direct, fanout, regex
from kiteq.binding.matching import Matcher, check_agreement


@pytest.mark.parametrize(
    ("binding", "taken", "left"),
    [
        (direct("t", "pay"), ["pay"], ["Pay", "pay2", "pa", "p.y"]),
        (direct("t", "pay.x"), ["pay.x"], ["pay-x"]),
        (fanout("t"), ["pay", "*", "x" * 255], []),
        (regex("t", "pay"), ["pay"], ["pays", "repay", "repays"]),
        (regex("t", "pay-.*"), ["pay-", "pay-succ"], ["pay", "x-pay-succ"]),
        (regex("t", "a|b"), ["a", "b"], ["ab", "ac", "cb"]),
        (regex("t", "^a$"), ["a"], ["aa"]),
        (regex("t", "(?i)pay"), ["PAY", "pay"], ["pays"]),
        (regex("t", r"\d{2,3}"), ["12", "123"], ["1", "1234"]),
        (regex("t", "(a+)+$"), ["a", "aaaa"], ["aab", ""]),
    ],
)
def test_what_a_binding_takes(binding: Binding, taken: list[str], left: list[str]) -> None:
    matcher = Matcher(binding)
    assert [name for name in taken if not matcher.matches(name)] == []
    assert [name for name in left if matcher.matches(name)] == []


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "missing )"),
        ("[a", "missing ]"),
        ("a{1001}", "invalid repetition size"),
        ("(?<=a)b", "invalid perl operator"),
        (r"\1", "invalid escape sequence"),
        ("*a", "no argument for repetition operator"),
        ("\\", "trailing"),
        (r"[\pL]{900}", "too large"),
        ("((a{100}){100}){100}", "invalid repetition size"),
        ("\ud800", "not valid text"),
    ],
)
def test_a_bad_pattern_is_refused_in_plain_words(pattern: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"the pattern .* is not valid") as refused:
        Matcher(regex("t", pattern))
    assert reason in str(refused.value)
    assert ": b'" not in str(refused.value)
    assert capfd.readouterr().err == "", "RE2 writes no log of its own"


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a*)*b", "(a|aa)+$", "(.*a){20}"])
def test_no_pattern_takes_more_than_linear_time(pattern: str) -> None:
    matcher = Matcher(regex("t", pattern))
    message_type = "a" * 199 + "!"
    matcher.matches(message_type)
    started = perf_counter()
    for _ in range(20):
        matcher.matches(message_type)
    # Backtracking would need 2^199 steps; the bound is generous for a busy machine.
    assert perf_counter() - started < 0.2


def test_bindings_that_agree_go_together() -> None:
    check_agreement([])
    check_agreement([direct("t", "a", watermark=5), regex("t", "b.*", watermark=5, start="first")])


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (fanout("t", persistent=False), r"direct\('t', 'a'\) has persistent=True but fanout\('t', '\*'\) has .*False"),
        (regex("t", "b", watermark=9), r"direct\('t', 'a'\) has watermark=None but regex\('t', 'b'\) has watermark=9"),
    ],
)
def test_bindings_that_disagree_are_named(other: Binding, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_agreement([direct("t", "a"), direct("t", "c"), other])
