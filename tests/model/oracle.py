"""What a broker with transactions must do, in plain Python: decisions, deliveries, and who may be asked when.

The oracle hears of each commit of the store just before the broker does, so it knows what is durable; what
the broker tells its clients is compared with that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kiteq.errors import StoreError
from kiteq.limits import CHECK_ANSWER_SECONDS, CHECK_INTERVAL_SECONDS_MAX, PARKED_CHECK_SECONDS
from kiteq.store.half_records import COUNTER_KEY, parse_checks, parse_decisions
from kiteq.store.tables import Table
from kiteq.store.writer import Submission
from tests.model.harness import Connection, Harness

JITTER = 1.1
SLACK_MS = 128
"""A check is at most two buckets of the wheel late."""
GENEROUS = 200
"""With so many checks a second none waits for another, though also those that find nobody to ask count."""
CONFLICT, UNKNOWN, FULL, QUOTA = "transaction_conflict", "unknown_transaction", "store_full", "half_quota"


@dataclass(eq=False)
class Half:
    """One message of a transaction."""

    id: bytes
    topic: str
    message_type: str
    delay_ms: int
    blob: bytes


@dataclass(eq=False)
class Request:
    """A packet that waits for its answer: what is to be answered at each place; None is success."""

    left: int
    codes: dict[int, str | None] = field(default_factory=dict)
    anything: set[int] = field(default_factory=set)
    """Places where success and "unknown" are both right: it was decided over an hour ago."""
    handles: dict[int, Transaction] = field(default_factory=dict)
    refusal: str | None = None

    def resolve(self, place: int, code: str | None) -> None:
        assert place not in self.codes
        self.codes[place] = code
        self.left -= 1


@dataclass(eq=False)
class Deciding:
    """A decision on its way to the disk, and what becomes deliverable by it."""

    commit: bool
    request: Request
    place: int
    at_ms: int
    routed: list[tuple[Half, frozenset[str]]] = field(default_factory=list)
    delayed: list[tuple[int, int, Half]] = field(default_factory=list)


@dataclass(eq=False)
class Asked:
    """A question under way."""

    connection: Connection
    deadline_ms: int


@dataclass(eq=False, repr=False)
class Transaction:
    """A transaction; `state` is preparing, open, parked, deciding, committed, rolled back; or gone, never stored.

    lo_ms, hi_ms: it is asked about not before the one, and when somebody is there soon after the other.
    waits: nobody could be asked, so that somebody may be as soon as a member connects; then it is released.
    rows: state of the checks as submitted, None for any; durable: as on the disk, with the time of the next check.
    """

    id: bytes
    group: str
    instance: bytes
    messages: list[Half]
    check_ms: int
    prepared_ms: int
    state: str = "preparing"
    handle: int = 0
    deciding: Deciding | None = None
    waiting: list[tuple[Request, int, bool]] = field(default_factory=list)
    asks: int = 0
    unknowns: int = 0
    lo_ms: float = 0
    hi_ms: float = 0
    asked: Asked | None = None
    waits: bool = False
    released: bool = False
    rows: list[tuple[int, int, bool] | None] = field(default_factory=list)
    durable: tuple[int, int, bool, int] | None = None
    decided_ms: int = 0

    def __repr__(self) -> str:
        return f"<{self.state} {self.id.hex()[-6:]} of {self.group}>"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def undecided(self) -> bool:
        return self.state in ("preparing", "open", "parked", "deciding")

    @property
    def is_open(self) -> bool:
        return self.state in ("open", "parked")

    @property
    def topics(self) -> frozenset[str]:
        return frozenset(message.topic for message in self.messages)

    def schedule(self, lo_ms: float, hi_ms: float) -> None:
        self.lo_ms, self.hi_ms = lo_ms, hi_ms


class Oracle:
    """All that is known of transactions, bindings and clients."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        harness.finished = self.finished
        self.transactions: dict[bytes, Transaction] = {}
        self.operations: dict[Submission, Callable[[StoreError | None], None]] = {}
        self.pending: dict[Connection, dict[int, Request]] = defaultdict(dict)
        self.bindings: dict[str, set[tuple[str, str | None]]] = defaultdict(set)
        """(topic, message type, None for all types) by group."""
        self.owed: dict[str, dict[bytes, Half]] = defaultdict(dict)
        """Messages by group in the order in which they became deliverable."""
        self.delayed: list[tuple[int, int, Half]] = []
        self.current: dict[bytes, Connection] = {}
        self.joined_ms: dict[Connection, int] = {}
        self.gone_ms: dict[bytes, int] = {}
        self.topics: dict[Connection, frozenset[str]] = {}
        self.started_ms = self.now
        self.allowance = 0.0
        self.allowance_ms = self.now
        self._count = 0

    @property
    def now(self) -> int:
        return self.harness.clock.epoch_ms()

    @property
    def full(self) -> bool:
        return self.harness.tables.full

    def undecided(self) -> list[Transaction]:
        return [one for one in self.transactions.values() if one.undecided]

    def open_of(self, group: str) -> int:
        return sum(one.group == group for one in self.undecided())

    def bound(self, message: Half) -> frozenset[str]:
        topic, message_type = message.topic, message.message_type
        return frozenset(
            group for group, bound in self.bindings.items() if bound & {(topic, None), (topic, message_type)}
        )

    # --- what becomes durable -------------------------------------------------------------------

    def finished(self, submission: Submission, error: StoreError | None) -> None:
        """Hear of a submission that was committed, or refused."""
        operation = self.operations.pop(submission, None)
        if operation is not None:
            operation(error)
        for table, key, value in submission.rows:
            if table is Table.DECISIONS and value is not None:
                for decision in parse_decisions(key, value).decisions:
                    self._decided(self.transactions[decision.transaction_id], decision.committed, error)
            elif table is Table.CHECKS and value is not None:
                handle = COUNTER_KEY.unpack(key)[0]
                transaction = next(one for one in self.transactions.values() if one.handle == handle)
                expected = transaction.rows.pop(0)
                if error is not None:
                    continue
                state = parse_checks(value)
                told = (state.asks, state.unknowns, state.parked_ms > 0)
                assert expected in (None, told), (expected, told)
                transaction.durable = (*told, state.next_ms)

    def _decided(self, transaction: Transaction, committed: bool, error: StoreError | None) -> None:
        deciding = transaction.deciding
        assert transaction.state == "deciding", f"decided again: {transaction}"
        assert deciding is not None
        assert deciding.commit == committed
        transaction.deciding = None
        waiting, transaction.waiting = transaction.waiting, []
        if error is None:
            transaction.state = "committed" if committed else "rolled back"
            transaction.decided_ms = deciding.at_ms
            for message, groups in deciding.routed:
                self.deliverable(message, groups)
            self.delayed += deciding.delayed
            deciding.request.resolve(deciding.place, None)
            for request, place, commit in waiting:
                request.resolve(place, None if commit == committed else CONFLICT)
            return
        assert committed, "a rollback frees room, so it is never refused"
        transaction.state = "open"
        due_ms = self.now + int(self.harness.settings.check_after * 1000)
        transaction.schedule(due_ms, due_ms)
        deciding.request.resolve(deciding.place, FULL)
        for request, place, commit in waiting:
            self.decide_one(transaction, request, place, commit=commit, group=None)

    def deliverable(self, message: Half, groups: frozenset[str]) -> None:
        """A message is owed to groups from now on."""
        for group in groups:
            self.owed[group][message.id] = message

    # --- decisions --------------------------------------------------------------------------------

    def decide_one(
        self, transaction: Transaction | None, request: Request, place: int, *, commit: bool, group: str | None
    ) -> None:
        """Judge one token of a request; `group` is that of the client, None for any."""
        if transaction is None or group not in (None, transaction.group) or transaction.state == "preparing":
            request.resolve(place, UNKNOWN)
        elif transaction.state == "deciding":
            transaction.waiting.append((request, place, commit))
        elif transaction.is_open:
            self._take(transaction, request, place, commit=commit)
        else:
            same = commit == (transaction.state == "committed")
            if self.now - transaction.decided_ms > 3_600_000:
                request.anything.add(place)
            request.resolve(place, None if same else CONFLICT)

    def _take(self, transaction: Transaction, request: Request, place: int, *, commit: bool) -> None:
        deciding = transaction.deciding = Deciding(commit, request, place, self.now)
        transaction.state = "deciding"
        if transaction.asked is not None:
            transaction.asked = None
            transaction.rows.append(None)
        for message in transaction.messages if commit else ():
            if message.delay_ms:
                self._count += 1
                deciding.delayed.append((self.now + 1 + message.delay_ms, self._count, message))
            else:
                deciding.routed.append((message, self.bound(message)))

    # --- clients ----------------------------------------------------------------------------------

    def preparer(self, transaction: Transaction) -> Connection | None:
        """Return the connection of the client that prepared a transaction while it is there."""
        connection = self.current.get(transaction.instance)
        return connection if connection is not None and connection.peer.group == transaction.group else None

    def others_from_ms(self, transaction: Transaction) -> int:
        gone_ms = self.gone_ms.get(transaction.instance, self.started_ms)
        return gone_ms + int(self.harness.settings.check_elsewhere_after * 1000)

    def eligible(self, transaction: Transaction) -> dict[Connection, int]:
        """Return who may be asked about a transaction now, and since when."""
        preparer = self.preparer(transaction)
        if preparer is not None:
            return {preparer: self.joined_ms[preparer]}
        others_from_ms = self.others_from_ms(transaction)
        members = [one for one in self.joined_ms if one.peer.group == transaction.group]
        return {
            member: max(self.joined_ms[member], others_from_ms)
            for member in members
            if others_from_ms <= self.now and transaction.topics <= self.topics[member]
        }

    def join(self, connection: Connection, topics: Sequence[str]) -> None:
        """A client was welcomed."""
        peer = connection.peer
        self.current[peer.instance] = connection
        self.gone_ms.pop(peer.instance, None)
        self.joined_ms[connection] = self.now
        self.topics[connection] = frozenset(topics)
        for transaction in self.undecided():
            if transaction.group == peer.group and transaction.waits:
                transaction.waits = False
                transaction.released = True
                transaction.lo_ms = min(transaction.lo_ms, self.now)
                if transaction.state == "parked" and transaction.asked is None:
                    transaction.hi_ms = min(transaction.hi_ms, self.now)

    def leave(self, connection: Connection) -> None:
        """A client has gone."""
        self.pending.pop(connection, None)
        del self.joined_ms[connection]
        instance = connection.peer.instance
        if self.current.get(instance) is not connection:
            return
        del self.current[instance]
        self.gone_ms[instance] = self.now
        for transaction in self.undecided():
            if transaction.asked is not None and transaction.asked.connection is connection:
                self.answered(transaction, unknown=False)

    # --- checks -----------------------------------------------------------------------------------

    def answered(self, transaction: Transaction, *, unknown: bool) -> None:
        """A question has ended without a decision."""
        settings = self.harness.settings
        transaction.asked = None
        if unknown:
            transaction.unknowns += 1
            if transaction.unknowns >= settings.check_limit:
                transaction.state = "parked"
        wait_s = min(settings.check_after * 2.0**transaction.asks, CHECK_INTERVAL_SECONDS_MAX)
        if transaction.state == "parked":
            wait_s = PARKED_CHECK_SECONDS
            transaction.waits = True
        transaction.schedule(self.now + int(wait_s * 1000), self.now + wait_s * 1000 * JITTER)
        transaction.rows.append((transaction.asks, transaction.unknowns, transaction.state == "parked"))

    def resume(self, transaction: Transaction) -> None:
        """The checks of a parked transaction begin again."""
        transaction.state = "open"
        transaction.unknowns = 0
        transaction.asked = None
        transaction.schedule(self.now, self.now)
        transaction.rows.append((transaction.asks, 0, False))

    def before_tick(self) -> set[Transaction]:
        """End questions that nobody answered; return what must be asked about now."""
        for transaction in self.undecided():
            if transaction.asked is not None and self.now >= transaction.asked.deadline_ms:
                if transaction.is_open:
                    self.answered(transaction, unknown=False)
                transaction.asked = None
        rate = self.harness.settings.checks_per_second
        self.allowance = min(rate / 4 + 1, self.allowance + (self.now - self.allowance_ms) * rate / 1000)
        self.allowance_ms = self.now
        return {
            one
            for one in self.undecided()
            if one.is_open
            and one.asked is None
            and one.hi_ms + SLACK_MS <= self.now
            and any(since + SLACK_MS <= self.now for since in self.eligible(one).values())
        }

    def asked(self, questions: Sequence[tuple[Connection, bytes, bytes]], must: set[Transaction]) -> None:
        """Judge what a tick asked: (who, token, message) each."""
        capacity = int(self.allowance)
        assert len(questions) <= capacity, "more questions than the cap allows"
        self.allowance -= len(questions)
        for connection, token, blob in questions:
            transaction = self.transactions[token[:16]]
            assert transaction.is_open, f"asked about what is decided: {transaction}"
            assert transaction.asked is None, f"asked twice at once: {transaction}"
            assert transaction.lo_ms <= self.now or transaction.released, f"asked too early: {transaction}"
            assert connection in self.eligible(transaction), f"{connection.peer.name} was asked: {transaction}"
            assert blob == transaction.messages[0].blob
            assert COUNTER_KEY.unpack(token[16:])[0] == transaction.handle
            transaction.asks += 1
            transaction.asked = Asked(connection, self.now + int(CHECK_ANSWER_SECONDS * 1000))
        all_taken = len(questions) < capacity and self.harness.settings.checks_per_second >= GENEROUS
        if all_taken:
            assert not [one for one in must if one.asked is None], "nobody was asked in time"
        for transaction in self.undecided():
            transaction.released &= not all_taken
            if transaction.lo_ms <= self.now and transaction.asked is None:
                transaction.waits = True

    # --- restarts ---------------------------------------------------------------------------------

    def restarted(self) -> None:
        """Only what is durable is left."""
        for transaction in list(self.undecided()):
            transaction.deciding = transaction.asked = None
            transaction.waiting.clear()
            transaction.rows.clear()
            transaction.released = False
            if transaction.state == "preparing":
                del self.transactions[transaction.id]
                transaction.state = "gone"
                continue
            transaction.asks, transaction.unknowns, parked, next_ms = transaction.durable or (0, 0, False, 0)
            transaction.state = "parked" if parked else "open"
            transaction.waits = parked
            due_ms = next_ms if transaction.durable else transaction.prepared_ms + transaction.check_ms
            transaction.schedule(due_ms, max(due_ms, self.now))
        self.operations.clear()
        self.pending.clear()
        self.current.clear()
        self.joined_ms.clear()
        self.gone_ms.clear()
        self.started_ms = self.allowance_ms = self.now
        self.allowance = 0.0
