"""The client written from doc/protocol.md alone does what the page promises, with a real broker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.protocol import raw_client
from tests.protocol.raw_client import PING, PONG, Message, RawClient, RefusedError
from tests.support.broker import BrokerProcess

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "doc" / "protocol.md"
LINES_MAX = 160
HANDED_BACK = 2


@pytest.fixture
def client(broker: BrokerProcess) -> Iterator[RawClient]:
    """A connection of the group `members`, bound to `pay-succ` of `trade`."""
    with RawClient(broker.host, broker.port) as connection:
        connection.greet("members", "trade", "pay-succ")
        yield connection


def paid(body: bytes = b"echo") -> Message:
    return Message("trade", "pay-succ", body)


def test_the_client_has_at_most_160_lines_and_imports_nothing_of_the_product() -> None:
    source = Path(raw_client.__file__).read_text()
    assert len(source.splitlines()) <= LINES_MAX
    assert re.findall(r"^(?:from|import) +(?:kiteq|tests)", source, re.MULTILINE) == []


def test_the_worked_example_of_the_page_is_encoded_and_decoded() -> None:
    block = re.search(r"```message\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    expected = bytes.fromhex("".join(line.split()[0] for line in block[1].splitlines()))
    message = Message(
        "trade",
        "pay-succ",
        b"echo",
        flags=1,
        id=bytes.fromhex("019aa0c8b40070008000000000000001"),
        created_ms=1_763_700_000_000,
    )
    assert message.encode() == expected
    assert Message.decode(expected) == message


def test_messages_come_back_byte_for_byte_and_stay_acked(broker: BrokerProcess, client: RawClient) -> None:
    client.grant(256)
    sent = [
        paid(b"plain"),
        paid(b""),
        paid(bytes(range(256)) * 1_000),
        Message("trade", "pay-succ", "größer".encode(), flags=1, properties={"from": "Zürich", "": ""}, key="order:7"),
        Message("trade", "pay-succ", b"limits", ttl_ms=604_800_000, deliver_limit=1),
    ]
    encoded = [message.encode() for message in sent]
    assert client.publish(*encoded) == ([1] * len(sent), True, [])
    deliveries = [client.receive() for _ in sent]
    assert sorted(delivery.data for delivery in deliveries) == sorted(encoded)
    assert {delivery.message.id: delivery.message for delivery in deliveries} == {m.id: m for m in sent}
    assert {delivery.attempt for delivery in deliveries} == {1}
    assert [delivery.tag for delivery in deliveries] == [1, 2, 3, 4, 5]
    assert client.ack(1, 2, 3, 4, 5) == []
    assert client.ack(5) == [5, 5]
    client.goodbye()
    with RawClient(broker.host, broker.port) as again:
        again.greet("members", "trade", "pay-succ")
        again.grant(256)
        last = paid(b"last").encode()
        again.publish(last)
        assert again.receive().data == last


def test_a_nacked_message_comes_again_as_attempt_2(client: RawClient) -> None:
    client.grant(1)
    message = paid().encode()
    client.publish(message)
    first = client.receive()
    assert client.nack(first.tag, "no such order") == []
    second = client.receive()
    assert (second.data, first.attempt, second.attempt) == (message, 1, 2)
    assert second.tag > first.tag
    assert client.nack(first.tag, "late") == [first.tag, first.tag]
    assert client.ack(second.tag) == []


def test_a_message_handed_back_uses_no_attempt(broker: BrokerProcess, client: RawClient) -> None:
    client.grant(1)
    message = paid().encode()
    client.publish(message)
    client.nack(client.receive().tag, "", HANDED_BACK)
    assert client.receive().attempt == 1
    client.goodbye()
    with RawClient(broker.host, broker.port) as other:
        other.greet("members", "trade", "pay-succ")
        other.grant(1)
        assert (other.receive()[1:3]) == (1, message)


def test_closing_without_goodbye_uses_an_attempt(broker: BrokerProcess) -> None:
    with RawClient(broker.host, broker.port) as client:
        client.greet("members", "trade", "pay-succ")
        client.grant(1)
        client.publish(paid().encode())
        assert client.receive().attempt == 1
    with RawClient(broker.host, broker.port) as other:
        other.greet("members", "trade", "pay-succ")
        other.grant(1)
        assert other.receive().attempt == 2


def test_a_repeated_id_is_a_duplicate_and_stored_once(client: RawClient) -> None:
    client.grant(256)
    message = paid()
    assert client.publish(message.encode()) == ([1], True, [])
    groups, _durable, [[index, code, _reason, _temporary]] = client.publish(paid(b"new").encode(), message.encode())
    assert (groups, index, code) == ([1, 0], 1, "duplicate")
    assert [client.receive().message.body for _ in range(2)] == [b"echo", b"new"]
    client.publish(paid(b"last").encode())
    assert client.receive().message.body == b"last"


def test_a_repeated_id_with_another_body_is_refused(client: RawClient) -> None:
    message = paid()
    client.publish(message.encode())
    other = Message("trade", "pay-succ", b"other", id=message.id)
    _groups, _durable, [[index, code, _reason, temporary]] = client.publish(other.encode())
    assert (index, code, temporary) == (0, "id_reused", False)


def test_a_wrong_checksum_is_refused_and_its_neighbours_are_accepted(client: RawClient) -> None:
    client.grant(256)
    damaged = bytearray(paid().encode())
    damaged[-5] ^= 1
    whole = [paid(b"before").encode(), paid(b"after").encode()]
    groups, durable, [[index, code, reason, temporary]] = client.publish(whole[0], bytes(damaged), whole[1])
    assert (groups, durable, index, code, temporary) == ([1, 0, 1], True, 1, "bad_checksum", False)
    assert reason
    assert [client.receive().data for _ in whole] == whole


def test_no_common_version_is_refused(broker: BrokerProcess) -> None:
    with RawClient(broker.host, broker.port) as client:
        with pytest.raises(RefusedError) as refused:
            client.greet("members", "trade", "pay-succ", versions=(7, 8))
        assert refused.value.args[0] == "protocol_version"
        with pytest.raises(OSError):
            client.ask(PING, answer=PONG)


def test_a_ping_is_answered_and_the_limits_are_the_documented_ones(broker: BrokerProcess) -> None:
    with RawClient(broker.host, broker.port) as client:
        client.greet("members", "trade", "pay-succ")
        client.ask(PING, answer=PONG)
        limits = client.limits
    assert (limits["frame_bytes"], limits["body_bytes"]) == (2_097_152, 1_048_576)
    assert (limits["heartbeat_ms"], limits["idle_ms"], limits["ack_deadline_ms"]) == (10_000, 35_000, 60_000)
