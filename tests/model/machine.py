"""Random steps of producers, consumers, administrators, time and crashes, each followed by all invariants."""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kiteq.limits import HALF_CACHE_BYTES_MAX
from kiteq.remoting.packets import (
    DECISION_COMMIT,
    DECISION_ROLLBACK,
    DECISION_RUNNING,
    DECISION_UNKNOWN,
    Ask,
)
from kiteq.store.half_records import COUNTER_KEY
from tests.model.clients import REPEATED_MS_MAX, Clients
from tests.model.harness import Connection, Harness, limit_cache
from tests.model.invariants import check, check_empty
from tests.model.oracle import Half, Oracle, Transaction

PRODUCERS = {
    b"p1".ljust(16, b"."): ("p", ["t", "u"]),
    b"p2".ljust(16, b"."): ("p", ["t"]),
    b"p3".ljust(16, b"."): ("p", ["t", "u"]),
    b"q1".ljust(16, b"."): ("q", ["t", "u"]),
    b"q2".ljust(16, b"."): ("q", ["u"]),
}
CONSUMERS = ("c", "d")
STEPS_S = (0.125, 0.25, 1.0, 6.25, 16.0, 31.0, 70.0, 700.0, 4_000.0)
"""In eighths of a second, so that the arithmetic of deadlines is exact."""
MESSAGES = st.tuples(st.sampled_from(["t", "t", "u"]), st.sampled_from("ab"), st.sampled_from([0, 0, 0, 5_000]))
SOME_PARTS = [[("t", "a", 0)], [("t", "b", 5_000), ("u", "a", 0)], [("t", "a", 0)]]
PARTS = st.lists(st.lists(MESSAGES, min_size=1, max_size=3), min_size=1, max_size=4)


class TransactionMachine(RuleBasedStateMachine):
    """Clients of a broker that remembers transactions in memory tables."""

    @initialize(
        rate=st.sampled_from([200, 200, 2]),
        quota=st.sampled_from([12, 1_000]),
        cache=st.sampled_from([HALF_CACHE_BYTES_MAX, 1]),
    )
    def start(self, rate: int, quota: int, cache: int) -> None:
        limit_cache(cache)
        self.harness = Harness(checks_per_second=rate, half_quota=quota, check_limit=2)
        self.oracle = Oracle(self.harness)
        self.clients = Clients(self.harness, self.oracle)
        self.clients.consume("c", b"c" * 16, "t", None)
        first = next(iter(PRODUCERS))
        group, topics = PRODUCERS[first]
        self.clients.join(group, first, topics)

    # --- choosing ---------------------------------------------------------------------------------

    def some_producer(self, data: st.DataObject) -> Connection:
        """Return a connected producer; there is one."""
        connected = [self.oracle.current[one] for one in PRODUCERS if one in self.oracle.current]
        if not connected:
            instance = data.draw(st.sampled_from(sorted(PRODUCERS)))
            group, topics = PRODUCERS[instance]
            return self.clients.join(group, instance, topics)
        return data.draw(st.sampled_from(connected))

    def some_transactions(self, data: st.DataObject, *, asked: bool = False) -> list[Transaction]:
        """Return transactions: mostly undecided ones, also others, also one twice."""
        if not self.oracle.undecided():
            self.clients.prepare(self.some_producer(data), self.made(SOME_PARTS), 0)
            self.harness.commit()
        known = list(self.oracle.transactions.values())
        undecided = self.oracle.undecided()
        if asked:
            undecided = [one for one in undecided if one.asked is not None] or undecided
        others_too = undecided and data.draw(st.integers(0, 4)) == 0
        among = known if others_too or not undecided else undecided
        if not among:
            return []
        chosen: st.SearchStrategy[list[Transaction]] = st.lists(st.sampled_from(among), min_size=1, max_size=4)
        return data.draw(chosen)

    def member_for(self, transaction: Transaction, data: st.DataObject) -> Connection:
        """Return who speaks about a transaction: mostly somebody of its group."""
        members = [one for one in self.oracle.joined_ms if one.peer.group == transaction.group]
        if transaction.asked is not None and transaction.asked.connection in members:
            members.insert(0, transaction.asked.connection)
        strangers = [one for one in self.oracle.joined_ms if one.peer.group != transaction.group]
        if not members or (strangers and data.draw(st.integers(0, 7)) == 7):
            members = strangers or [self.some_producer(data)]
        return data.draw(st.sampled_from(members))

    def made(self, parts: list[list[tuple[str, str, int]]]) -> list[list[Half]]:
        return [[self.clients.message(*one) for one in part] for part in parts]

    # --- rules --------------------------------------------------------------------------------------

    @rule(instance=st.sampled_from(sorted(PRODUCERS)))
    def join(self, instance: bytes) -> None:
        group, topics = PRODUCERS[instance]
        self.clients.join(group, instance, topics)

    @rule(data=st.data(), goodbye=st.booleans())
    def leave(self, data: st.DataObject, goodbye: bool) -> None:
        producers = [one for one in self.oracle.joined_ms if one.peer.group not in CONSUMERS]
        if producers:
            self.clients.leave(data.draw(st.sampled_from(producers)), goodbye=goodbye)

    @rule(
        group=st.sampled_from(CONSUMERS),
        topic=st.sampled_from(["t", "u"]),
        message_type=st.sampled_from([None, "a"]),
        stays=st.booleans(),
    )
    def consume(self, group: str, topic: str, message_type: str | None, stays: bool) -> None:
        for member in self.clients.members(group):
            self.clients.leave(member, goodbye=True)
        consumer = self.clients.consume(group, group.encode() * 16, topic, message_type)
        check(self.clients)
        if not stays:
            self.clients.leave(consumer, goodbye=True)

    @rule(data=st.data(), count=st.integers(1, 5))
    def ack(self, data: st.DataObject, count: int) -> None:
        consumers = [one for group in CONSUMERS for one in self.clients.members(group)]
        if consumers:
            self.clients.ack(data.draw(st.sampled_from(consumers)), count)

    @rule(data=st.data(), parts=PARTS, check_ms=st.sampled_from([0, 0, 1_000, 60_000]), durable=st.booleans())
    def prepare(
        self, data: st.DataObject, parts: list[list[tuple[str, str, int]]], check_ms: int, durable: bool
    ) -> None:
        self.clients.prepare(self.some_producer(data), self.made(parts), check_ms)
        if durable:
            self.harness.commit()

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        connection = self.some_producer(data)
        frames = [
            one
            for one in self.clients.sent
            if self.oracle.now - one.at_ms < REPEATED_MS_MAX and one.group == connection.peer.group
        ]
        if frames:
            frame = data.draw(st.sampled_from(frames))
            self.clients.prepare(connection, frame.parts, 0, again=True)

    @rule(data=st.data(), messages=st.lists(MESSAGES, min_size=1, max_size=2), durable=st.booleans())
    def enlist(self, data: st.DataObject, messages: list[tuple[str, str, int]], durable: bool) -> None:
        for transaction in self.some_transactions(data)[:1]:
            self.clients.enlist(self.member_for(transaction, data), transaction, self.made([messages])[0])
        if durable:
            self.harness.commit()

    @rule(
        data=st.data(),
        decision=st.sampled_from([DECISION_COMMIT, DECISION_ROLLBACK]),
        durable=st.booleans(),
        stranger=st.integers(0, 9),
    )
    def decide(self, data: st.DataObject, decision: int, durable: bool, stranger: int) -> None:
        transactions = self.some_transactions(data)
        if transactions:
            tokens = [one.id + COUNTER_KEY.pack(one.handle) if one.handle else one.id for one in transactions]
            if stranger == 0:
                tokens.insert(1, b"nobody knows it.")
            self.clients.decide(self.member_for(transactions[0], data), decision, tokens)
        if durable:
            self.harness.commit()

    @rule(data=st.data(), decision=st.sampled_from([DECISION_UNKNOWN, DECISION_UNKNOWN, DECISION_RUNNING]))
    def answer(self, data: st.DataObject, decision: int) -> None:
        transactions = self.some_transactions(data, asked=True)
        if transactions:
            connection = self.member_for(transactions[0], data)
            self.clients.answer(connection, decision, [one.id for one in transactions])

    @rule(data=st.data(), verb=st.sampled_from(["tx.commit", "tx.rollback", "tx.resume", "tx.resume"]))
    def by_hand(self, data: st.DataObject, verb: str) -> None:
        parked = [one for one in self.oracle.undecided() if one.state == "parked"]
        for transaction in (parked if verb == "tx.resume" else [])[:1] or self.some_transactions(data)[:1]:
            self.clients.by_hand(verb, transaction)

    @rule(count=st.integers(0, 3))
    def commit(self, count: int) -> None:
        self.harness.commit(count or None)

    @rule(steps=st.lists(st.sampled_from(STEPS_S), min_size=1, max_size=3))
    def pass_time(self, steps: list[float]) -> None:
        for seconds in steps:
            self.harness.clock.advance(seconds)
            self.tick()

    @rule(steps=st.integers(1, 8), decision=st.sampled_from([DECISION_UNKNOWN, DECISION_UNKNOWN, DECISION_RUNNING]))
    def live_on(self, steps: int, decision: int) -> None:
        """Time passes, and whoever is asked answers."""
        for _ in range(steps):
            self.harness.clock.advance(16.0)
            self.tick()
            for transaction in self.oracle.undecided():
                if transaction.asked is not None:
                    self.clients.answer(transaction.asked.connection, decision, [transaction.id])
            self.harness.commit()
            check(self.clients)

    def tick(self) -> None:
        on_the_way = [one for half in self.oracle.undecided() if half.deciding for one in half.deciding.delayed]
        if on_the_way or self.oracle.delayed:
            self.harness.commit()  # the timer waits for what is on its way, and may move that at once
        must = self.oracle.before_tick()
        due = sorted(one for one in self.oracle.delayed if one[0] <= self.oracle.now)
        self.oracle.delayed = [one for one in self.oracle.delayed if one[0] > self.oracle.now]
        for _, _, message in due:
            self.oracle.deliverable(message, self.oracle.bound(message))
        self.harness.tick()
        questions = [
            (connection, token, blob)
            for connection in self.harness.connections
            for packet in connection.take(Ask)
            for token, blob in zip(packet.tokens, packet.messages, strict=True)
        ]
        self.oracle.asked(questions, must)
        check(self.clients)

    @rule(
        what=st.sampled_from(["crash", "crash", "tidy", "tidy between crashes", "fill", "empty", "list"]),
        durable=st.integers(0, 4),
    )
    def upkeep(self, what: str, durable: int) -> None:
        if what == "list":
            self.list_all()
        elif what in ("fill", "empty"):
            self.harness.tables.full = what == "fill"
        else:
            if "crash" in what:
                self.clients.crash(durable)
                check(self.clients)
            if "tidy" in what:
                self.harness.tidy()
            if what == "tidy between crashes":
                self.clients.crash(0)

    @rule(data=st.data())
    def commit_without_room(self, data: st.DataObject) -> None:
        """Some transactions of one frame are refused, others of it may be rolled back meanwhile."""
        transactions = self.some_transactions(data)
        if transactions:
            self.harness.commit()
            self.harness.tables.full = self.harness.tables.crammed = True
            member = self.member_for(transactions[0], data)
            self.clients.decide(member, DECISION_COMMIT, [one.id for one in transactions])
            self.clients.decide(member, DECISION_ROLLBACK, [one.id for one in self.some_transactions(data)])
            self.harness.commit()
            self.harness.tables.full = self.harness.tables.crammed = False

    def list_all(self) -> None:
        self.harness.commit()
        admin = self.harness.connect("admin", instance=b"a" * 16)
        rows: list[dict[str, Any]] = self.harness.ask(admin, "tx.list", limit=1_000)
        told: dict[str, object] = {
            row["id"]: (row["state"], row["group"], row["messages"], set(row["topics"])) for row in rows
        }
        assert told == {
            one.id.hex(): (one.state, one.group, len(one.messages), one.topics) for one in self.oracle.undecided()
        }
        self.harness.leave(admin, goodbye=True)

    # --- invariants ---------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "clients"):
            check(self.clients)

    def teardown(self) -> None:
        """What is open at the end survives one more restart, and can be decided; then nothing is left of it."""
        try:
            if hasattr(self, "clients") and sys.exception() is None:
                self._end()
        finally:
            limit_cache(HALF_CACHE_BYTES_MAX)

    def _end(self) -> None:
        self.harness.tables.full = False
        self.harness.commit()
        check(self.clients)
        self.clients.crash(0)
        for group in CONSUMERS:
            self.clients.consume(group, group.encode() * 16, "t", None)
        check(self.clients)
        for number, transaction in enumerate(self.oracle.undecided()):
            self.clients.by_hand("tx.commit" if number % 2 else "tx.rollback", transaction)
        self.harness.tidy()
        check(self.clients)
        check_empty(self.clients)
