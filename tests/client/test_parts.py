"""The parts of the client that know no network."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiteq.limits import UNANSWERED_BYTES_MAX
from kiteq.remoting.packets import Ack, Nack
from kiteq_client import Decision, Handlers, Message, Received
from kiteq_client.deciding import Deciding, Verdict
from kiteq_client.incoming import Answers, to_ranges
from kiteq_client.members import Listed
from kiteq_client.outgoing import FRAME_BYTES, Frame, Outgoing, Submission
from kiteq_client.registry import Address, parse_registry
from kiteq_client.statistics import Counters


@pytest.mark.parametrize(
    ("registry", "addresses"),
    [
        ("kiteq://host:1", (("host", 1),)),
        ("host:1", (("host", 1),)),
        ("kiteq://host", (("host", 13_800),)),
        ("kiteq://a:1,b:2/", (("a", 1), ("b", 2))),
        ("kiteq://a:1,a:1", (("a", 1),)),
        ("[::1]:5", (("::1", 5),)),
        ("kiteq://[::1]", (("::1", 13_800),)),
    ],
)
def test_a_registry_names_brokers(registry: str, addresses: tuple[tuple[str, int], ...]) -> None:
    assert parse_registry(registry) == addresses


def test_of_a_set_that_one_broker_tells_anew_nothing_is_left_of_what_others_told() -> None:
    one, two, three, other = (Address(f"h{number}", 1) for number in range(4))
    listed = Listed([one, other])
    listed.told(other, ["h3:1", "x:1"])
    for by in (one, two, three):
        listed.told(by, ["h0:1", "h1:1", "h2:1"])
    listed.told(one, ["h0:1", "h1:1"])
    assert set(listed.known()) == {one, two, other, Address("x", 1)}


def test_a_decision_that_was_asked_for_is_sent_once_after_a_lost_connection() -> None:
    requests = count(1)
    deciding = Deciding(lambda: None, lambda _verdict: None, 5.0)
    deciding.connected("b1")
    verdict = Verdict(bytes(16), Decision.COMMIT, "b1")
    deciding.submit(verdict)
    assert [packet.tokens for packet in deciding.take(lambda: next(requests))] == [[bytes(16)]]
    deciding.again(verdict, bytes(24))
    deciding.connected("b1")
    assert [packet.tokens for packet in deciding.take(lambda: next(requests))] == [[bytes(24)]]


def test_an_address_reads_as_it_was_written() -> None:
    assert [str(Address("a", 1)), str(Address("::1", 2))] == ["a:1", "[::1]:2"]


@pytest.mark.parametrize(
    "registry",
    ["", "kiteq://", "http://a:1", "a:0", "a:65536", "a:x", "::1", "a b:1", "kiteq://a:1/topic", "a:1,"],
)
def test_a_wrong_registry_is_named(registry: str) -> None:
    with pytest.raises(ValueError, match=r"registry|host:port|port|ZooKeeper|brackets"):
        parse_registry(registry)


def test_the_most_exact_handler_is_found() -> None:
    handlers = Handlers()

    @handlers.on("trade")
    async def rest(_message: Received) -> None: ...

    @handlers.on("trade", "pay")
    async def exact(_message: Received) -> None: ...

    assert handlers.find("trade", "pay") is exact
    assert handlers.find("trade", "other") is rest
    assert handlers.find("feed", "pay") is None
    for again in (handlers.on("trade"), handlers.on("trade", "pay")):
        with pytest.raises(ValueError, match="already"):
            again(exact)
    with pytest.raises(TypeError, match="async def"):
        handlers.on("feed")(len)  # type: ignore[type-var]


@given(st.sets(st.integers(0, 60)), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=5))
def test_ranges_say_what_the_tags_said(tags: set[int], spans: list[tuple[int, int]]) -> None:
    ranges = [(first, first + length) for first, length in spans]
    flat = to_ranges(tags, ranges)
    said = {tag for first, last in zip(flat[::2], flat[1::2], strict=True) for tag in range(first, last + 1)}
    assert said == tags.union(*(range(first, last + 1) for first, last in ranges))
    assert all(right - left > 1 for left, right in zip(flat[1:-1:2], flat[2::2], strict=True))


def test_answers_are_collected_until_a_flush() -> None:
    pending: list[None] = []
    numbers = iter(range(1, 10))
    counters = Counters()
    answers = Answers(4, lambda: pending.append(None), counters)
    assert [answers.ack(tag) for tag in (1, 2, 5)] == [False, False, False]
    assert answers.nack(3, 0, None, "e" * 5_000)
    assert len(pending) == 1
    ack, nack = answers.flush(lambda: next(numbers))
    assert ack == Ack(1, [1, 2, 5, 5])
    assert isinstance(nack, Nack)
    assert len(str(nack.items[0][3])) == 1_024
    assert (counters.acked, counters.nacked) == (3, 1)
    answers.settled(1, [2, 2])
    assert (answers.unsettled, counters.stale) == ({2}, 1)


@given(st.lists(st.sampled_from([0, 100, 1_000, 70_000, 300_000]), min_size=1, max_size=40), st.integers(1, 30))
def test_frames_bring_every_message_once_in_order_within_the_window(sizes: list[int], window: int) -> None:
    outgoing = Outgoing(window, lambda: None)
    messages = [Message("t", "x", bytes(size)) for size in sizes]
    half = len(messages) // 2
    for part in (messages[:half], messages[half:]):
        if part:
            outgoing.submit(Submission(part, 0, lambda: None))
    blobs: list[bytes] = []
    while (frame := outgoing.take(1 << 20)) is not None:
        assert len(frame.blobs) == 1 or frame.size <= FRAME_BYTES
        assert outgoing.in_flight <= window
        assert outgoing.in_flight_bytes <= UNANSWERED_BYTES_MAX
        if outgoing.in_flight == window:
            assert outgoing.take(1 << 20) is None
        blobs += frame.blobs
        outgoing.release(frame)
    assert blobs == [message.encoded() for message in messages]
    assert (outgoing.in_flight, outgoing.in_flight_bytes) == (0, 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_what_comes_back_is_sent_again_in_the_order_of_the_calls(counts: list[int], random: Random) -> None:
    outgoing = Outgoing(1_000, lambda: None)
    calls = [[Message("t", "x") for _ in range(count)] for count in counts]
    for call in calls:
        outgoing.submit(Submission(call, 0, lambda: None))
    frames: list[Frame] = []
    for _ in range(20):
        if frames and random.random() < 0.5:
            outgoing.release(frame := frames.pop(random.randrange(len(frames))))
            outgoing.submit_again(frame)
        elif (taken := outgoing.take(1 << 20, messages_max=random.randint(1, 3))) is not None:
            frames.append(taken)
    for frame in random.sample(frames, len(frames)):
        outgoing.release(frame)
        outgoing.submit_again(frame)
    last = outgoing.take(1 << 20)
    assert last is not None
    assert last.blobs == [message.encoded() for call in calls for message in call]


def test_who_waits_for_room_gets_it_before_plain_messages() -> None:
    woken: list[None] = []
    outgoing = Outgoing(3, lambda: woken.append(None))
    assert outgoing.reserve(5, 10)  # alone, however large
    assert not outgoing.reserve(1, 10)
    outgoing.submit(Submission([Message("t", "x")], 0, lambda: None))
    outgoing.give_back(3, 6)
    assert not outgoing.reserve(2, 10)
    assert outgoing.take(1 << 20) is None
    count = len(woken)
    outgoing.give_back(2, 4)
    assert len(woken) == count + 1
    assert outgoing.reserve(2, 10)
    assert outgoing.take(1 << 20) is not None
    assert not outgoing.reserve(1, UNANSWERED_BYTES_MAX)
    outgoing.want_no_more()
    assert (outgoing.in_flight, len(woken)) == (3, count + 2)
