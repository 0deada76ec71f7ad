"""Shows transactions, and takes decisions by hand.

What is open is known from the columns in memory; topics, messages and checks are read from the disk, in
threads, so that a list over a million of them stalls nobody.
"""

from __future__ import annotations

import heapq
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import compress, count, islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack
import trio

from kiteq.errors import Refused
from kiteq.ids import check_id
from kiteq.message import BadMessage, parse_extras, parse_head, split
from kiteq.pipe.settlement import head_of
from kiteq.store.half_reading import HalfRead, decision_rows, find_decisions, read_checks, read_halves
from kiteq.store.halves import State
from kiteq.store.tables import Row, Table
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.transactions import Exceptions
    from kiteq.store.half_records import CheckState, Decision, DecisionRow
    from kiteq.store.tables import Tables

__all__ = ["TransactionViews"]

LISTED_MAX: Final = 1_000
"""Of one answer: it must fit a frame."""
READ_AT_ONCE: Final = 64
"""Transactions read from the disk in one piece: their messages are in memory meanwhile."""
REASON_LENGTH_MAX: Final = 1_000
"""Characters of a reason: two sentences and a link."""
AUDIT_SECONDS_MAX: Final = 365 * 86_400
"""How long decisions by hand are remembered: a year, so that the yearly review finds them."""
AUDIT_TRIMMED_BYTES: Final = 64 * 1024
"""Old ones that go with one new one."""
AUDIT_PAGE_BYTES: Final = 1 << 20
AUDIT_KEY: Final = struct.Struct(">QI")
"""(when, in ms; counter)."""
END: Final = b"\xff" * 13

STATES: Final = {int(State.OPEN): "open", int(State.PARKED): "parked", int(State.DECIDING): "open"}
"""What a transaction is called while it is not decided; one whose decision is on its way still counts as open."""

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a list was asked for. numbers: of the states in memory; before_ms: prepared or decided until then."""

    decided: bool
    numbers: frozenset[int]
    group: str | None
    topic: str | None
    before_ms: int | None
    limit: int


class _Columns(NamedTuple):
    """A copy of what is in memory, for a thread. group: number of the only group, None for all."""

    state: bytes
    handle: Any
    row: Any
    group: Any
    prepared_s: Any
    parts: dict[int, list[int]]


class _Half(NamedTuple):
    """What the disk says of an undecided transaction."""

    handle: int
    transaction_id: bytes
    prepared_ms: int
    instance: bytes
    topics: list[str]
    messages: int
    first: bytes


class TransactionViews:
    """One method for each verb `tx.…`; `verbs` names them.

    Among the arguments of each, `client` is who asks, as the broker knows it.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._count = count()
        self.verbs: dict[str, Callable[[Arguments], Any]] = {
            "tx.list": self._list,
            "tx.show": self._show,
            "tx.commit": partial(self._decide, "commit"),
            "tx.rollback": partial(self._decide, "rollback"),
            "tx.resume": self._resume,
            "tx.audit": self._audit,
        }

    # --- lists --------------------------------------------------------------------------------

    async def _list(self, arguments: Arguments) -> list[dict[str, Any]]:
        core, wanted = self._core, self._wanted(arguments)
        halves, now_ms = core.store.halves, core.clock.epoch_ms()
        if wanted.decided:
            find = partial(_decided_rows, core.store.tables, halves.next_decision, wanted, now_ms)
            return await trio.to_thread.run_sync(find)
        group = next((number for number, tally in enumerate(halves.groups) if tally.name == wanted.group), -1)
        columns = _Columns(
            bytes(halves.state), halves.handle[:], halves.row[:], halves.group[:], halves.prepared_s[:],
            {handle: list(rows) for handle, rows in halves.parts.items()},
        )  # fmt: skip
        found = await trio.to_thread.run_sync(_find_halves, core.store.tables, columns, wanted, group)
        return [row for half in found if (row := self._half_row(half)) is not None]

    def _wanted(self, arguments: Arguments) -> _Wanted:
        state, limit, older_than_s = (arguments.get(name) for name in ("state", "limit", "older_than_s"))
        group, topic = arguments.get("group"), arguments.get("topic")
        limit = 100 if limit is None else limit
        if state not in (None, "open", "parked", "decided"):
            raise Refused("bad_argument", "state is open, parked or decided")
        if type(limit) is not int or not 1 <= limit <= LISTED_MAX:
            raise Refused("bad_argument", f"limit is 1 to {LISTED_MAX}")
        if older_than_s is not None and (type(older_than_s) not in (int, float) or not older_than_s >= 0):
            raise Refused("bad_argument", "older_than_s is a number of seconds")
        if any(name is not None and not isinstance(name, str) for name in (group, topic)):
            raise Refused("bad_argument", "group and topic are names")
        if state == "decided" and topic is not None:
            raise Refused("bad_argument", "the topics of decided transactions are not kept; leave the topic out")
        before_ms = None
        if older_than_s is not None:
            before_ms = int(max(0, self._core.clock.epoch_ms() - older_than_s * 1000))
        numbers = frozenset(number for number, name in STATES.items() if state in (None, name))
        return _Wanted(state == "decided", numbers, group, topic, before_ms, limit)

    def _half_row(self, half: _Half) -> dict[str, Any] | None:
        """Return the row of an undecided transaction; None when it was decided meanwhile."""
        core, halves = self._core, self._core.store.halves
        slot = halves.find(half.transaction_id)
        if slot is None or halves.handle[slot] != half.handle:
            return None
        return {
            "id": half.transaction_id.hex(),
            "state": STATES.get(halves.state[slot], "open"),
            "group": halves.tally(slot).name,
            "topics": half.topics,
            "messages": half.messages,
            "prepared_ms": half.prepared_ms,
            "age_s": max(0, core.clock.epoch_ms() - half.prepared_ms) // 1000,
            "asks": halves.asks[slot],
            "unknowns": halves.unknowns[slot],
            "next_check_ms": core.checks.next_ms(slot),
            "decision": None,
            "decided_ms": None,
            "decided_by": None,
        }

    # --- one ----------------------------------------------------------------------------------

    async def _show(self, arguments: Arguments) -> dict[str, Any]:
        core, transaction_id = self._core, _id(arguments)
        halves, tables = core.store.halves, core.store.tables
        await core.store.all_durable()  # answers to checks are written when there is time
        slot = halves.find(transaction_id)
        if slot is not None:
            handle = halves.handle[slot]
            rows = [halves.row[slot], *halves.parts.get(handle, ())]
            half, checks = await trio.to_thread.run_sync(_read_one, tables, rows, handle)
            row = None if half is None else self._half_row(half)
            if half is not None and row is not None:
                row["instance"] = half.instance.hex()
                row["message"] = _message(half.first)
                row["reason"] = None
                return row | _checks(checks)
            if halves.find(transaction_id) == slot and halves.handle[slot] == handle:
                raise Refused("damaged", f"transaction {transaction_id.hex()} cannot be read from the store")
        read = partial(_read_decided, tables, transaction_id, halves.next_decision, core.clock.epoch_ms())
        shown = await trio.to_thread.run_sync(read)
        if shown is None:
            raise Refused("unknown_transaction", f"no transaction {transaction_id.hex()} is known here")
        return shown

    # --- hands --------------------------------------------------------------------------------

    async def _decide(self, verb: str, arguments: Arguments) -> dict[str, Any]:
        """Decide as a client would; the row of the audit log is written in the same transaction of the store."""
        core, transaction_id = self._core, _id(arguments)
        reason = arguments.get("reason")
        if not isinstance(reason, str) or not reason.strip():
            raise Refused("bad_argument", "say why, in reason")
        reason = reason.strip()[:REASON_LENGTH_MAX]
        client = arguments["client"]
        now_ms = core.clock.epoch_ms()
        slot = core.store.halves.find(transaction_id)
        key = AUDIT_KEY.pack(now_ms, next(self._count))
        rows: list[Row] = []
        if slot is not None:
            group = core.store.halves.tally(slot).name
            entry = msgpack.packb([verb, transaction_id, group, reason, client])
            rows = [(Table.AUDIT, key, entry), *await trio.to_thread.run_sync(_old_audit, core.store.tables, now_ms)]
        exceptions: Exceptions = []
        finished = trio.Event()

        def done(found: Exceptions) -> None:
            exceptions.extend(found)
            finished.set()

        core.transactions.decide(
            [transaction_id], done, commit=verb == "commit", group=None, by=f"{client}, by hand", reason=reason,
            rows=rows,
        )  # fmt: skip
        core.turn.end()
        await finished.wait()
        for _, code, text, temporary in exceptions:
            raise Refused(code, text, temporary)
        written = await trio.to_thread.run_sync(core.store.tables.get, Table.AUDIT, key)
        decision = "committed" if verb == "commit" else "rolled back"
        return {"id": transaction_id.hex(), "decision": decision, "changed": written is not None}

    async def _resume(self, arguments: Arguments) -> dict[str, Any]:
        """Let the checks of a parked transaction begin again, now, also after a restart."""
        core, transaction_id = self._core, _id(arguments)
        slot = core.store.halves.find(transaction_id)
        if slot is None:
            raise Refused("unknown_transaction", f"no open or parked transaction {transaction_id.hex()} is known here")
        is_parked = core.store.halves.state[slot] == State.PARKED
        if is_parked:
            submission = Submission()
            submission.rows.append(core.checks.resume(slot))
            await core.store.write(submission)
        return {"id": transaction_id.hex(), "resumed": is_parked}

    async def _audit(self, arguments: Arguments) -> list[dict[str, Any]]:
        limit = arguments.get("limit", 100)
        if type(limit) is not int or not 1 <= limit <= LISTED_MAX:
            raise Refused("bad_argument", f"limit is 1 to {LISTED_MAX}")
        return await trio.to_thread.run_sync(_audit_rows, self._core.store.tables, limit)


def _id(arguments: Arguments) -> bytes:
    try:
        return check_id(arguments.get("id", ""))
    except ValueError:
        raise Refused("bad_argument", "the id of a transaction is 32 hex digits") from None


# --- in threads -------------------------------------------------------------------------------


def _find_halves(tables: Tables, columns: _Columns, wanted: _Wanted, group: int) -> list[_Half]:
    """Return undecided transactions, the oldest first. group: number of the wanted one, if one is wanted."""
    before_s = None if wanted.before_ms is None else wanted.before_ms // 1000
    handle_of, row_of = columns.handle, columns.row
    is_wanted = bytes(number in wanted.numbers for number in range(256))
    matching: Iterable[int] = (
        slot
        for slot in compress(range(len(columns.state)), columns.state.translate(is_wanted))
        if (wanted.group is None or columns.group[slot] == group)
        and (before_s is None or columns.prepared_s[slot] <= before_s)
    )
    if wanted.topic is None:
        slots = heapq.nsmallest(wanted.limit, matching, key=handle_of.__getitem__)
    else:
        slots = sorted(matching, key=handle_of.__getitem__)
    found: list[_Half] = []
    start = 0
    while start < len(slots):
        end = min(start + READ_AT_ONCE, len(slots))
        while end < len(slots) and row_of[slots[end]] == row_of[slots[end - 1]]:
            end += 1  # so that no row is opened twice
        some, start = slots[start:end], end
        rows = {handle_of[slot]: [row_of[slot], *columns.parts.get(handle_of[slot], ())] for slot in some}
        read = read_halves(tables, rows)
        for handle in (handle_of[slot] for slot in some):
            half = None if handle not in read else _summary(handle, read[handle])
            if half is not None and (wanted.topic is None or wanted.topic in half.topics):
                found.append(half)
                if len(found) == wanted.limit:
                    return found
    return found


def _summary(handle: int, read: HalfRead) -> _Half | None:
    first = read.blobs[0]
    if first is None:
        return None
    heads = [None if blob is None else head_of(blob) for blob in read.blobs]
    topics = dict.fromkeys(head.topic for head in heads if head is not None)
    head = read.head
    return _Half(handle, first[:16], head.prepared_ms, head.instance, list(topics), len(read.blobs), first)


def _read_one(tables: Tables, rows: list[int], handle: int) -> tuple[_Half | None, CheckState]:
    read = read_halves(tables, {handle: rows}).get(handle)
    return None if read is None else _summary(handle, read), read_checks(tables, handle)


def _message(blob: bytes) -> dict[str, Any] | None:
    """Return what is shown of the first message; its body is nobody's business here."""
    try:
        head_bytes, extras, _ = split(blob)
        head, properties = parse_head(head_bytes), dict(parse_extras(extras).properties)
    except BadMessage:
        return None
    return {"topic": head.topic, "message_type": head.message_type, "properties": properties, "bytes": len(blob)}


def _checks(state: CheckState) -> dict[str, Any]:
    checks = [
        {"at_ms": at_ms, "client": client, "answer": answer, "answered_ms": answered_ms}
        for at_ms, client, answer, answered_ms in state.history
    ]
    return {"checks": checks, "parked_ms": state.parked_ms or None}


def _decided_rows(tables: Tables, below: int, wanted: _Wanted, now_ms: int) -> list[dict[str, Any]]:
    """Return decided transactions, the latest first."""
    return list(islice(_each_decided(tables, below, wanted, now_ms), wanted.limit))


def _each_decided(tables: Tables, below: int, wanted: _Wanted, now_ms: int) -> Iterator[dict[str, Any]]:
    for _, row in decision_rows(tables, below):
        if wanted.group not in (None, row.group) or (wanted.before_ms is not None and row.at_ms > wanted.before_ms):
            continue
        for decision in row.decisions:
            yield _decided_row(row, decision, now_ms)


def _decided_row(row: DecisionRow, decision: Decision, now_ms: int) -> dict[str, Any]:
    return {
        "id": decision.transaction_id.hex(),
        "state": "decided",
        "group": row.group,
        "topics": [],
        "messages": None,
        "prepared_ms": None,
        "age_s": max(0, now_ms - row.at_ms) // 1000,
        "asks": None,
        "unknowns": None,
        "next_check_ms": None,
        "decision": "committed" if decision.committed else "rolled back",
        "decided_ms": row.at_ms,
        "decided_by": row.by,
    }


def _read_decided(tables: Tables, transaction_id: bytes, below: int, now_ms: int) -> dict[str, Any] | None:
    found = find_decisions(tables, [transaction_id], below).get(transaction_id)
    if found is None:
        return None
    row, decision = found
    shown = _decided_row(row, decision, now_ms)
    shown |= {"reason": row.reason, "instance": None, "message": None}
    return shown | _checks(read_checks(tables, decision.handle))


def _old_audit(tables: Tables, now_ms: int) -> list[Row]:
    """Return rows that remove decisions by hand older than a year, some at a time."""
    end = AUDIT_KEY.pack(max(0, now_ms - AUDIT_SECONDS_MAX * 1000), 0)
    return [(Table.AUDIT, key, None) for key, _ in tables.scan(Table.AUDIT, b"", end, bytes_max=AUDIT_TRIMMED_BYTES)]


def _audit_rows(tables: Tables, limit: int) -> list[dict[str, Any]]:
    """Return decisions by hand, the latest first."""
    latest: deque[tuple[bytes, bytes]] = deque(maxlen=limit)
    start = b""
    while page := tables.scan(Table.AUDIT, start, END, bytes_max=AUDIT_PAGE_BYTES):
        latest.extend(page)
        start = page[-1][0] + b"\0"
    rows = []
    for key, value in reversed(latest):
        verb, transaction_id, group, reason, client = msgpack.unpackb(value)
        at_ms = AUDIT_KEY.unpack(key)[0]
        rows.append(
            {
                "at_ms": at_ms, "verb": verb, "id": transaction_id.hex(), "group": group, "reason": reason,
                "client": client,
            }
        )  # fmt: skip
    return rows
