"""A broker with traps at its steps, for `python -m tests.faults.crashing_broker`; the broker itself knows of none.

Its functions are wrapped before it starts: what the engine writes, what a connection sends, where a decision
comes in, and the recovery. Waits that only tidy up are shorter than in the product, so that a test meets them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import kiteq.checking
import kiteq.store.recovery
import kiteq.store.store
from kiteq.__main__ import main
from kiteq.pipe.peer import Peer
from kiteq.pipe.transactions import Transactions
from kiteq.remoting.packets import Ask, Deliver, Packet, Prepared
from kiteq.remoting.session import Session
from kiteq.store.half_records import parse_decisions, parse_half_head
from kiteq.store.lmdb import LmdbTables
from kiteq.store.tables import Row, Table
from tests.faults.trap import BROKER, Trap

KEEP_VARIABLE: Final = "CRASHING_DECISION_KEEP_SECONDS"
SENT: Final[dict[type[Packet], str]] = {Prepared: "half-answered", Ask: "asked", Deliver: "delivered"}
"""Packets that a trap may wait for, and its point once they are on the way."""

trap = Trap(Path.cwd(), BROKER)


def _wrap(owner: object, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


# --- what the engine writes -----------------------------------------------------------------------


def _written(tables: LmdbTables, rows: Iterable[Row]) -> list[tuple[str, list[bool]]]:
    """Return which steps a commit of the store is part of, with the decisions in it."""
    steps: dict[str, list[bool]] = {}
    for table, key, value in rows:
        if table is Table.HALF and value is not None:
            known = tables.get(table, key) is not None
            enlisted = parse_half_head(key, value).enlisted
            steps.setdefault("rewrite" if known else "part" if enlisted else "half", [])
        elif table is Table.DECISIONS and value is not None:
            steps.setdefault("decision", []).extend(one.committed for one in parse_decisions(key, value).decisions)
        elif table is Table.DECISIONS:
            steps.setdefault("trim", [])
        elif table is Table.CHECKS and value is not None:
            steps.setdefault("note", [])
        elif table is Table.META and key == b"half-clean":
            steps.setdefault("clean", [])
    return list(steps.items())


def _traps_of_writing(apply: Callable[[LmdbTables, list[Row]], None]) -> Callable[[LmdbTables, list[Row]], None]:
    def applying(tables: LmdbTables, rows: list[Row]) -> None:
        steps = _written(tables, rows)
        for step, commits in steps:
            trap.reach(f"{step}-arrived", *commits)
        if steps:
            _write_half(tables, rows, steps)
        apply(tables, rows)
        for step, commits in steps:
            trap.reach(f"{step}-durable", *commits)

    return applying


def _write_half(tables: LmdbTables, rows: list[Row], steps: list[tuple[str, list[bool]]]) -> None:
    """Be in the middle of the engine's transaction; if nobody dies there it is given up and made anew."""
    with tables._env.begin(write=True) as transaction:
        for table, key, value in rows[: (len(rows) + 1) // 2]:
            if value is not None:
                transaction.put(key, value, db=tables._databases[table])
        for step, commits in steps:
            trap.reach(f"{step}-midway", *commits)
        transaction.abort()


# --- what a connection sends ------------------------------------------------------------------------

_points: dict[int, list[tuple[str, bool]]] = {}
"""By the identity of a peer, the points that are reached once what it has queued is on the way."""


def _traps_of_sending(send: Callable[[Peer, Packet], None]) -> Callable[[Peer, Packet], None]:
    def sending(peer: Peer, packet: Packet) -> None:
        send(peer, packet)
        if (point := SENT.get(type(packet))) is not None:
            _points.setdefault(id(peer), []).append((point, False))

    return sending


def _traps_of_flushing(flush: Callable[[Session], None]) -> Callable[[Session], None]:
    def flushing(session: Session) -> None:
        flush(session)
        for point, commit in _points.pop(id(session._peer), ()):
            trap.reach(point, commit)

    return flushing


# --- decisions, recovery ------------------------------------------------------------------------------


def _traps_of_deciding(decide: Callable[..., None]) -> Callable[..., None]:
    def deciding(transactions: Transactions, tokens: Any, done: Any, *, commit: bool, **others: Any) -> None:
        trap.reach("decision-read", commit)
        peer = others.get("peer")

        def answered(exceptions: Any) -> None:
            done(exceptions)
            if peer is not None:
                _points.setdefault(id(peer), []).append(("decision-answered", commit))

        decide(transactions, tokens, answered, commit=commit, **others)

    return deciding


def _traps_of_recovering(recover: Callable[..., Any]) -> Callable[..., Any]:
    def recovering(*arguments: Any) -> Any:
        trap.reach("recovering")
        recovered = recover(*arguments)
        trap.reach("recovered")
        return recovered

    return recovering


def prepare() -> None:
    """Put the traps into the broker's functions."""
    _wrap(LmdbTables, "apply", _traps_of_writing)
    _wrap(Peer, "send", _traps_of_sending)
    _wrap(Session, "flush", _traps_of_flushing)
    _wrap(Transactions, "decide", _traps_of_deciding)
    _wrap(kiteq.store.store, "recover", _traps_of_recovering)
    kiteq.checking.TICK_SECONDS = 0.02  # type: ignore[misc]
    kiteq.checking.TIDY_SECONDS = 0.05  # type: ignore[misc]
    if (keep := os.environ.get(KEEP_VARIABLE)) is not None:
        kiteq.checking.DECISION_KEEP_SECONDS = float(keep)  # type: ignore[attr-defined]


if __name__ == "__main__":
    prepare()
    main(sys.argv[1:])
