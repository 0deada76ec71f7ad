"""Transactions as an administrator sees and decides them, over real sockets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from kiteq.binding.bindings import fanout
from kiteq.broker import Broker
from kiteq.message import Message
from kiteq.pipe import transaction_views
from kiteq.remoting.packets import DECISION_COMMIT, DECISION_RUNNING, DECISION_UNKNOWN, Ask
from kiteq.store.tables import Table
from kiteq.store.writer import Submission
from tests.e2e.wire import PATIENCE_SECONDS, TICK_SECONDS, JumpingClock, RawClient, Refused, connect, numbered, running

INSTANCE = b"i" * 16


@pytest.fixture
async def owner(server: Broker) -> RawClient:
    return await connect(server, "orders", topics=["t"], instance=INSTANCE)


@pytest.fixture
async def admin(server: Broker) -> RawClient:
    return await connect(server, "kiteq-cli")


async def answered(client: RawClient, clock: JumpingClock, decision: int) -> None:
    """Put the clock forward until the client is asked about something, and answer."""
    question: Ask | None = None
    with trio.fail_after(PATIENCE_SECONDS):
        while question is None:
            clock.advance(5)
            with trio.move_on_after(TICK_SECONDS):
                question = await client.wait(Ask)
    assert await client.decide(decision, question.tokens) == []


async def refused(client: RawClient, verb: str, **arguments: Any) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        await client.admin(verb, **arguments)
    return caught.value.code, caught.value.reason


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


async def test_an_open_transaction_is_listed_with_what_is_known(
    owner: RawClient, admin: RawClient, clock: JumpingClock
) -> None:
    assert await admin.admin("tx.list") == []
    first, second = Message("t", "a", b"1"), Message("u", "a", b"2")
    await owner.prepare([first, second], 2)
    clock.advance(3)
    [row] = await admin.admin("tx.list")
    assert 3 <= row.pop("age_s") <= 13
    assert row.pop("next_check_ms") >= row["prepared_ms"] + 6_000
    assert abs(row.pop("prepared_ms") + 3_000 - clock.epoch_ms()) < 10_000
    assert row == {
        "id": first.id.hex(), "state": "open", "group": "orders", "topics": ["t", "u"], "messages": 2, "asks": 0,
        "unknowns": 0, "decision": None, "decided_ms": None, "decided_by": None,
    }  # fmt: skip


async def test_lists_are_narrowed_by_state_group_topic_and_age(
    server: Broker, owner: RawClient, admin: RawClient, clock: JumpingClock
) -> None:
    other = await connect(server, "payments", topics=["u"])
    old, young = numbered(2)
    theirs = Message("u", "a", b"x")
    await owner.prepare([old])
    clock.advance(100)
    await owner.prepare([young])
    await other.prepare([theirs])
    assert ids(await admin.admin("tx.list")) == [old.id.hex(), young.id.hex(), theirs.id.hex()]
    assert ids(await admin.admin("tx.list", limit=2)) == [old.id.hex(), young.id.hex()]
    assert ids(await admin.admin("tx.list", group="payments")) == [theirs.id.hex()]
    assert ids(await admin.admin("tx.list", group="nobody")) == []
    assert ids(await admin.admin("tx.list", topic="u")) == [theirs.id.hex()]
    assert ids(await admin.admin("tx.list", older_than_s=90)) == [old.id.hex()]
    assert ids(await admin.admin("tx.list", state="open")) == [old.id.hex(), young.id.hex(), theirs.id.hex()]
    assert ids(await admin.admin("tx.list", state="parked")) == []
    await owner.roll_back(young.id)
    await owner.commit(old.id)
    assert ids(await admin.admin("tx.list")) == [theirs.id.hex()]
    rows = await admin.admin("tx.list", state="decided")
    assert [(row["id"], row["decision"]) for row in rows] == [
        (old.id.hex(), "committed"), (young.id.hex(), "rolled back")
    ]  # fmt: skip
    assert rows[0]["decided_by"].endswith(f"/{INSTANCE.hex()[:8]}")
    assert abs(rows[0]["decided_ms"] - clock.epoch_ms()) < 10_000
    assert ids(await admin.admin("tx.list", state="decided", limit=1)) == [old.id.hex()]
    assert ids(await admin.admin("tx.list", state="decided", group="payments")) == []
    assert ids(await admin.admin("tx.list", state="decided", older_than_s=90)) == []


async def test_many_are_listed_though_they_are_read_in_pieces(
    owner: RawClient, admin: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction_views, "READ_AT_ONCE", 3)
    messages = numbered(40)
    for start in range(0, 40, 10):
        await owner.prepare(messages[start : start + 10])
    await owner.commit(*(message.id for message in messages[::2]))
    assert ids(await admin.admin("tx.list")) == [message.id.hex() for message in messages[1::2]]


async def test_a_transaction_is_shown_with_its_checks(owner: RawClient, admin: RawClient, clock: JumpingClock) -> None:
    message = Message("t", "a", b"secret", properties={"k": "v"})
    await owner.prepare([message])
    added = Message("u", "a", b"more")
    await owner.enlist(message.id, [added])
    await answered(owner, clock, DECISION_RUNNING)
    await answered(owner, clock, DECISION_UNKNOWN)
    shown = await admin.admin("tx.show", id=message.id.hex())
    assert (shown["state"], shown["instance"], shown["parked_ms"]) == ("open", INSTANCE.hex(), None)
    assert (shown["messages"], shown["topics"]) == (2, ["t", "u"])
    assert (shown["asks"], shown["unknowns"]) == (2, 1)
    assert [one["answer"] for one in shown["checks"]] == ["running", "unknown"]
    assert all(one["client"].endswith(f"/{INSTANCE.hex()[:8]}") for one in shown["checks"])
    assert all(shown["prepared_ms"] < one["at_ms"] <= one["answered_ms"] for one in shown["checks"])
    size = len(message.encoded())
    assert shown["message"] == {"topic": "t", "message_type": "a", "properties": {"k": "v"}, "bytes": size}
    assert b"secret" not in repr(shown).encode()
    await answered(owner, clock, DECISION_COMMIT)
    shown = await admin.admin("tx.show", id=message.id.hex())
    assert (shown["state"], shown["decision"], shown["reason"]) == ("decided", "committed", None)
    assert [one["answer"] for one in shown["checks"]] == ["running", "unknown", "commit"]


async def test_a_hand_commits_and_the_audit_log_says_who_and_why(
    server: Broker, owner: RawClient, admin: RawClient
) -> None:
    consumer = await connect(server, "members", fanout("t"), window=10)
    one, other = numbered(2)
    await owner.prepare([one, other])
    assert await admin.admin("tx.audit") == []
    result = await admin.admin("tx.commit", id=one.id.hex(), reason=" the order is paid ")
    assert result == {"id": one.id.hex(), "decision": "committed", "changed": True}
    [delivery] = await consumer.take(1)
    assert delivery.blob == one.encoded()
    await admin.admin("tx.rollback", id=other.id.hex(), reason="never paid")
    await consumer.take_nothing()
    latest, earlier = await admin.admin("tx.audit")
    assert (latest["verb"], latest["id"], latest["reason"]) == ("rollback", other.id.hex(), "never paid")
    assert (earlier["verb"], earlier["group"], earlier["reason"]) == ("commit", "orders", "the order is paid")
    assert earlier["client"].startswith("127.0.0.1:")
    assert await admin.admin("tx.audit", limit=1) == [latest]
    shown = await admin.admin("tx.show", id=one.id.hex())
    assert (shown["decision"], shown["reason"]) == ("committed", "the order is paid")
    assert shown["decided_by"] == f"{earlier['client']}, by hand"


async def test_a_hand_cannot_change_what_was_decided(owner: RawClient, admin: RawClient) -> None:
    message, *_ = numbered(1)
    await owner.prepare([message])
    await owner.commit(message.id)
    again = await admin.admin("tx.commit", id=message.id.hex(), reason="to be sure")
    assert again == {"id": message.id.hex(), "decision": "committed", "changed": False}
    code, reason = await refused(admin, "tx.rollback", id=message.id.hex(), reason="no")
    assert code == "transaction_conflict"
    assert "was committed by " in reason
    assert await admin.admin("tx.audit") == []


async def test_a_producer_is_told_what_a_hand_decided(owner: RawClient, admin: RawClient) -> None:
    message, *_ = numbered(1)
    await owner.prepare([message])
    await admin.admin("tx.rollback", id=message.id.hex(), reason="gone")
    [[_, code, _, temporary]] = await owner.commit(message.id)
    assert (code, temporary) == ("transaction_conflict", False)
    assert await owner.roll_back(message.id) == []


async def test_decisions_by_hand_and_their_reasons_survive_a_restart(folder: Path, clock: JumpingClock) -> None:
    one, other = numbered(2)
    async with running(folder, clock) as broker:
        owner, admin = await connect(broker, "orders", topics=["t"]), await connect(broker, "cli")
        await connect(broker, "members", fanout("t"))
        await owner.prepare([one, other])
        await admin.admin("tx.commit", id=one.id.hex(), reason="paid")
    clock.advance(1)
    async with running(folder, clock) as broker:
        admin, consumer = await connect(broker, "cli"), await connect(broker, "members", window=10)
        assert [delivery.blob for delivery in await consumer.take(1)] == [one.encoded()]
        assert ids(await admin.admin("tx.list")) == [other.id.hex()]
        await admin.admin("tx.rollback", id=other.id.hex(), reason="not paid")
        rows = await admin.admin("tx.audit")
        assert [row["reason"] for row in rows] == ["not paid", "paid"]


async def test_old_entries_leave_the_audit_log(owner: RawClient, admin: RawClient, clock: JumpingClock) -> None:
    one, other = numbered(2)
    await owner.prepare([one, other])
    await admin.admin("tx.commit", id=one.id.hex(), reason="long ago")
    clock.advance(transaction_views.AUDIT_SECONDS_MAX + 60)
    await admin.admin("tx.commit", id=other.id.hex(), reason="now")
    assert [row["reason"] for row in await admin.admin("tx.audit")] == ["now"]


async def test_a_parked_transaction_is_resumed(folder: Path, clock: JumpingClock) -> None:
    message, *_ = numbered(1)
    async with running(folder, clock, check_limit=1, check_after=1.0) as broker:
        owner, admin = await connect(broker, "orders", topics=["t"]), await connect(broker, "cli")
        await owner.prepare([message])
        assert (await admin.admin("tx.resume", id=message.id.hex()))["resumed"] is False
        await answered(owner, clock, DECISION_UNKNOWN)
        [row] = await admin.admin("tx.list")
        assert (row["state"], row["unknowns"]) == ("parked", 1)
        assert (await admin.admin("tx.show", id=message.id.hex()))["parked_ms"] is not None
        assert ids(await admin.admin("tx.list", state="parked")) == [message.id.hex()]
        assert ids(await admin.admin("tx.list", state="open")) == []
        stat = (await admin.admin("stat"))["transactions"]
        assert (stat["parked"], stat["open"]) == (1, 0)
        assert (stat["groups"]["orders"]["parked"], stat["groups"]["orders"]["open"]) == (1, 0)
        assert await admin.admin("tx.resume", id=message.id.hex()) == {"id": message.id.hex(), "resumed": True}
    async with running(folder, clock, check_limit=1, check_after=1.0) as broker:
        owner, admin = await connect(broker, "orders", topics=["t"]), await connect(broker, "cli")
        [row] = await admin.admin("tx.list")
        assert (row["state"], row["unknowns"]) == ("open", 0)
        await answered(owner, clock, DECISION_COMMIT)


async def test_what_cannot_be_read_is_not_listed_and_shown_as_damaged(
    server: Broker, owner: RawClient, admin: RawClient
) -> None:
    message, other = numbered(2)
    await owner.prepare([message])
    await owner.prepare([other])
    store = server.core.store
    [(key, value), _] = store.tables.scan(Table.HALF, b"", b"\xff" * 9)
    written = trio.Event()
    submission = Submission(lambda _error: written.set())
    submission.rows.append((Table.HALF, key, value[:-8] + b"\0" * 8))
    store.writer.submit(submission)
    await written.wait()
    assert ids(await admin.admin("tx.list")) == [other.id.hex()]
    assert (await refused(admin, "tx.show", id=message.id.hex()))[0] == "damaged"
    assert (await admin.admin("tx.show", id=other.id.hex()))["message"]["topic"] == "t"


def test_of_a_message_that_makes_no_sense_nothing_is_shown() -> None:
    assert transaction_views._message(b"rubbish") is None


@pytest.mark.parametrize(
    ("verb", "arguments", "word"),
    [
        ("tx.list", {"state": "gone"}, "open, parked or decided"),
        ("tx.list", {"limit": 0}, "limit"),
        ("tx.list", {"limit": True}, "limit"),
        ("tx.list", {"older_than_s": -1}, "seconds"),
        ("tx.list", {"older_than_s": "1"}, "seconds"),
        ("tx.list", {"older_than_s": float("nan")}, "seconds"),
        ("tx.list", {"group": 1}, "names"),
        ("tx.list", {"state": "decided", "topic": "t"}, "not kept"),
        ("tx.audit", {"limit": 1001}, "limit"),
        ("tx.show", {}, "32 hex digits"),
        ("tx.show", {"id": 5}, "32 hex digits"),
        ("tx.commit", {"id": "00" * 16}, "reason"),
        ("tx.commit", {"id": "00" * 16, "reason": "  "}, "reason"),
        ("tx.rollback", {"id": "00" * 16, "reason": 1}, "reason"),
        ("tx.resume", {"id": "xyz"}, "32 hex digits"),
    ],
)
async def test_a_wrong_argument_is_refused(admin: RawClient, verb: str, arguments: dict[str, Any], word: str) -> None:
    code, reason = await refused(admin, verb, **arguments)
    assert code == "bad_argument"
    assert word in reason


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [("tx.show", {}), ("tx.commit", {"reason": "x"}), ("tx.rollback", {"reason": "x"}), ("tx.resume", {})],
)
async def test_a_transaction_nobody_knows_is_refused(admin: RawClient, verb: str, arguments: dict[str, Any]) -> None:
    code, reason = await refused(admin, verb, id="ab" * 16, **arguments)
    assert code == "unknown_transaction"
    assert "ab" * 16 in reason
    assert await admin.admin("tx.audit") == []
