"""Transactions without a block: prepared, and decided by what names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kiteq.errors import KiteQError, NotConnected, UnknownTransaction
from kiteq.message import Message
from kiteq_client.broker import Broker
from kiteq_client.deciding import Verdict
from kiteq_client.decision import Decision
from kiteq_client.transaction import explained, pending
from kiteq_client.transactions import Transactions

__all__ = ["Prepared", "decide", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A transaction that is durable and undecided: what `client.commit` and `client.rollback` take.

    id: 16 bytes, the id of its first message. broker: the name of the broker that has it. handle: the
    broker's number for it.
    """

    id: bytes
    broker: str
    handle: int


async def prepare(transactions: Transactions, messages: Sequence[Message], check_after_ms: int) -> Prepared:
    """Make a transaction durable and leave it to the checks. Raises as entering a block does."""
    half = await transactions.begin(messages, check_after_ms)
    transactions.let_go(half)
    return Prepared(half.id, half.name, int.from_bytes(half.token[16:], "big"))


async def decide(transactions: Transactions, what: Prepared | bytes | str, decision: Decision) -> None:
    """Decide at the broker that knows it; without a `Prepared` each is asked in turn, whoever is silent.

    Raises as leaving a block does, always `DecisionPending` when there is no answer, and `NotConnected`
    when it may be known to a broker that is not reached.
    """
    transactions.check()
    unknown: KiteQError | None = None
    late: list[tuple[Broker, Verdict]] = []
    for broker, token, name in _places(transactions.brokers.all, what):
        verdict = Verdict(token, decision, name, quiet=True)
        await transactions.decide(broker, verdict)
        if not verdict.answered:
            late.append((broker, verdict))
        elif isinstance(verdict.error, UnknownTransaction):
            unknown = verdict.error
        else:
            for other, unanswered in late:
                other.deciding.drop(unanswered.id)
            if verdict.error is not None:
                raise explained(verdict)
            return
    if late:
        raise pending(late[0][1], transactions.timeout)
    away = transactions.brokers.away()
    if isinstance(what, Prepared) and not any(one.name == what.broker for one in transactions.brokers.all):
        raise NotConnected(f"broker {what.broker}, which has transaction {what.id.hex()}, is not connected")
    if unknown is None or away:
        raise NotConnected("; ".join(map(str, away.values())) or "no broker is connected")
    transactions.counters.unknown_transactions += 1
    raise unknown


def _places(brokers: list[Broker], what: Prepared | bytes | str) -> list[tuple[Broker, bytes, str]]:
    """Return which brokers to ask, and how each may know it."""
    if isinstance(what, Prepared):
        for broker in brokers:
            if broker.name == what.broker:
                return [(broker, what.id + what.handle.to_bytes(8, "big"), what.broker)]
        key = what.id
    else:
        key = _id_of(what)
    if len(brokers) == 1:
        return [(brokers[0], key, "")]
    return [(broker, key, broker.name) for broker in brokers if broker.session is not None]


def _id_of(what: bytes | str) -> bytes:
    if isinstance(what, str) and len(what) == 32:
        return bytes.fromhex(what)
    if isinstance(what, bytes) and len(what) == 16:
        return what
    raise ValueError(f"a transaction is named by a Prepared, 16 bytes or 32 hex digits, not by {what!r:.100}")
