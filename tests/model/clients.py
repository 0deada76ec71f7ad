"""What clients do in the model: each method sends something, and tells the oracle what must come of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from kiteq.binding.bindings import Binding, direct, fanout
from kiteq.errors import StoreError
from kiteq.message import Message
from kiteq.remoting import packets
from kiteq.remoting.packets import DECISION_COMMIT, DECISION_UNKNOWN
from kiteq.store.half_records import parse_half_head
from kiteq.store.tables import Table
from kiteq.store.writer import Submission
from tests.model.harness import Connection, Harness
from tests.model.oracle import CONFLICT, FULL, QUOTA, UNKNOWN, Half, Oracle, Request, Transaction

WINDOW: Final = 1_000
REPEATED_MS_MAX: Final = 400_000
"""A frame is sent again only while its ids are certainly remembered."""
ADMIN: Final = b"admin".ljust(16, b".")


@dataclass
class SentFrame:
    """A prepare frame that may be sent again."""

    group: str
    parts: list[list[Half]]
    at_ms: int


class Clients:
    """All clients of a broker."""

    def __init__(self, harness: Harness, oracle: Oracle) -> None:
        self.harness = harness
        self.oracle = oracle
        self.sent: list[SentFrame] = []
        self.known: dict[str, set[bytes]] = defaultdict(set)
        """By group, the transactions whose messages the broker remembers to have stored."""
        self.adding: list[tuple[Transaction, list[Half]]] = []
        """Messages that are added to transactions and not durable."""
        self.held: dict[str, dict[bytes, tuple[Connection, int]]] = defaultdict(dict)
        self.delivered: dict[str, list[bytes]] = defaultdict(list)
        """By group, what was ever delivered, in order."""
        self._made = 0

    def members(self, group: str) -> list[Connection]:
        return [one for one in self.harness.connections if one.peer.group == group]

    def message(self, topic: str, message_type: str, delay_ms: int = 0) -> Half:
        self._made += 1
        message_id = self._made.to_bytes(15, "big") + bytes([self._made % 3])
        message = Message(topic, message_type, b"body", id=message_id, delay=delay_ms / 1000 or None)
        return Half(message_id, topic, message_type, delay_ms, message.encoded())

    # --- coming and going -------------------------------------------------------------------------

    def join(self, group: str, instance: bytes, topics: Sequence[str]) -> Connection:
        """Connect a producer; an older connection of the same client ends after that."""
        older = self.oracle.current.get(instance)
        connection = self.harness.connect(group, instance=instance, topics=topics)
        self.oracle.join(connection, topics)
        if older is not None:
            self.leave(older, goodbye=False)
        return connection

    def consume(self, group: str, instance: bytes, topic: str, message_type: str | None) -> Connection:
        """Connect a consumer with a binding of its group."""
        binding: Binding = fanout(topic) if message_type is None else direct(topic, message_type)
        connection = self.harness.connect(group, instance=instance, bindings=[binding], window=WINDOW)
        self.oracle.join(connection, ())
        self.oracle.bindings[group].add((topic, message_type))
        return connection

    def leave(self, connection: Connection, *, goodbye: bool) -> None:
        self.harness.leave(connection, goodbye=goodbye)
        self.oracle.leave(connection)
        held = self.held[connection.peer.group]
        for message_id in [one for one, (holder, _) in held.items() if holder is connection]:
            del held[message_id]

    def ack(self, connection: Connection, count: int) -> None:
        """Ack the first messages that a connection holds; that is durable at once."""
        group = connection.peer.group
        mine = [(tag, one) for one, (holder, tag) in self.held[group].items() if holder is connection]
        ranges = list(chain.from_iterable((tag, tag) for tag, _ in sorted(mine)[:count]))
        self.harness.send(connection, packets.Ack(connection.next_request(), ranges))
        self.harness.commit()
        [answer] = connection.take(packets.Settled)
        assert answer.stale == []
        for _, message_id in sorted(mine)[:count]:
            del self.held[group][message_id]
            del self.oracle.owed[group][message_id]

    # --- transactions -----------------------------------------------------------------------------

    def prepare(self, connection: Connection, parts: list[list[Half]], check_ms: int, *, again: bool = False) -> None:
        """Send one frame of transactions."""
        oracle, group, now = self.oracle, connection.peer.group, self.oracle.now
        request = Request(1)
        room = self.harness.settings.half_quota - oracle.open_of(group)
        new: list[Transaction] = []
        repeated: list[tuple[int, bytes]] = []
        for place, messages in enumerate(parts):
            transaction_id = messages[0].id
            older = oracle.transactions.get(transaction_id)
            if transaction_id in self.known[group] or (older is not None and older.undecided):
                repeated.append((place, transaction_id))
            elif len(new) == room:
                request.codes[place] = QUOTA
            else:
                instance = connection.peer.instance
                new.append(Transaction(transaction_id, group, instance, list(messages), check_ms or 6_000, now))
                oracle.transactions[transaction_id] = request.handles[place] = new[-1]
                self.known[group].add(transaction_id)
        if not again:
            self.sent.append(SentFrame(group, parts, now))
        packet = packets.Prepare(
            connection.next_request(), [one.blob for part in parts for one in part], [len(part) for part in parts],
            check_ms,
        )  # fmt: skip
        oracle.pending[connection][packet.request] = request
        [submission] = self.harness.send(connection, packet)

        def finished(error: StoreError | None) -> None:
            request.left = 0
            if error is not None:
                request.refusal = FULL
                for transaction in new:
                    del oracle.transactions[transaction.id]
                    transaction.state = "gone"
                    self.known[group].discard(transaction.id)
                return
            for transaction, handle in zip(new, _handles(submission), strict=True):
                transaction.state, transaction.handle = "open", handle
                transaction.schedule(oracle.now + transaction.check_ms, oracle.now + transaction.check_ms)
            for place, transaction_id in repeated:
                self._judge(request, place, transaction_id, group)

        oracle.operations[submission] = finished

    def _judge(self, request: Request, place: int, transaction_id: bytes, group: str) -> None:
        """Answer for a transaction that was sent before: it must still be open."""
        transaction = self.oracle.transactions.get(transaction_id)
        if transaction is not None and transaction.is_open and transaction.group == group:
            request.handles[place] = transaction
        else:
            request.codes[place] = CONFLICT if transaction_id in self.known[group] else FULL

    def enlist(self, connection: Connection, transaction: Transaction, messages: list[Half]) -> None:
        """Add messages to a transaction."""
        oracle, group = self.oracle, connection.peer.group
        request = Request(1)
        fits = transaction.group == group and transaction.is_open
        if not fits:
            mine = transaction.group == group and transaction.state == "deciding"
            request.codes[0] = CONFLICT if mine else UNKNOWN
        else:
            transaction.messages += messages
            self.adding.append((transaction, messages))
        packet = packets.Enlist(connection.next_request(), transaction.id, [one.blob for one in messages])
        oracle.pending[connection][packet.request] = request
        [submission] = self.harness.send(connection, packet)

        def finished(error: StoreError | None) -> None:
            request.left = 0
            if fits:
                self.adding.remove((transaction, messages))
            if error is not None:
                request.refusal = FULL
                transaction.messages = [one for one in transaction.messages if not fits or one not in messages]
            elif fits:
                request.handles[0] = transaction

        oracle.operations[submission] = finished

    def decide(self, connection: Connection, decision: int, tokens: Sequence[bytes]) -> None:
        """Commit or roll back, or answer a check with one of these."""
        request = Request(len(tokens))
        packet = packets.Decide(connection.next_request(), decision, list(tokens))
        self.oracle.pending[connection][packet.request] = request
        for place, token in enumerate(tokens):
            transaction = self.oracle.transactions.get(token[:16])
            commit = decision == DECISION_COMMIT
            self.oracle.decide_one(transaction, request, place, commit=commit, group=connection.peer.group)
        self.harness.send(connection, packet)

    def answer(self, connection: Connection, decision: int, tokens: Sequence[bytes]) -> None:
        """Answer checks without a decision."""
        packet = packets.Decide(connection.next_request(), decision, list(tokens))
        self.oracle.pending[connection][packet.request] = Request(0)
        for token in tokens:
            transaction = self.oracle.transactions.get(token[:16])
            if transaction is None or not transaction.is_open or transaction.group != connection.peer.group:
                continue
            if transaction.asked is not None:
                self.oracle.answered(transaction, unknown=decision == DECISION_UNKNOWN)
        self.harness.send(connection, packet)

    # --- by hand ----------------------------------------------------------------------------------

    def by_hand(self, verb: str, transaction: Transaction) -> None:
        """Decide a transaction, or let its checks begin again, as an administrator."""
        self.harness.commit()
        admin = self.harness.connect("admin", instance=ADMIN)
        if verb == "tx.resume":
            known, parked = transaction.undecided, transaction.state == "parked"
            if parked:
                self.oracle.resume(transaction)
            result = self.harness.ask(admin, verb, id=transaction.id.hex())
            expected = {"id": transaction.id.hex(), "resumed": parked} if known else UNKNOWN
            assert result == expected, (result, expected, transaction)
        else:
            request = Request(1)
            changed = transaction.is_open
            found = self.oracle.transactions.get(transaction.id)
            self.oracle.decide_one(found, request, 0, commit=verb == "tx.commit", group=None)
            result = self.harness.ask(admin, verb, id=transaction.id.hex(), reason="because")
            code = request.codes[0]
            if code is None and not isinstance(result, str):
                assert result["changed"] == changed
            else:
                assert result == code or (request.anything and result == UNKNOWN), (result, code)
        self.harness.leave(admin, goodbye=True)

    # --- restarts ---------------------------------------------------------------------------------

    def crash(self, durable: int) -> None:
        """Kill the broker and all connections."""
        self.harness.crash(durable)
        for transaction, messages in self.adding:
            transaction.messages = [one for one in transaction.messages if one not in messages]
        self.adding.clear()
        self.held.clear()
        self.oracle.restarted()
        for known in self.known.values():
            known.intersection_update(self.oracle.transactions)


def _handles(submission: Submission) -> list[int]:
    rows = [(key, value) for table, key, value in submission.rows if table is Table.HALF and value is not None]
    return [handle for key, value in rows for handle in parse_half_head(key, value).handles]
