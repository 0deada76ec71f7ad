"""Judges what a history says of transactions.

    I3   what nobody has committed is neither delivered, nor counted as waiting, nor a dead letter
    I4   what was rolled back is never delivered, and no later commit is taken
    I5   the first durable decision is the only one: the same again is confirmed, the opposite is refused
    I6   a commit that was confirmed, or that stands in the producer's database, reaches every bound group
    I7   what is prepared stays until it is decided; only its own producers are asked, and only they decide;
         it is parked only after enough answers "unknown"
    I8   the messages of a transaction reach all groups, or none

What needs the end of a run (I6, I8, a part of I7) is judged only when the history has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from tests.faults.model import Model, Transaction, Violation

__all__ = ["TRANSACTION_RULES"]

CONFLICT: Final = "transaction_conflict"
UNKNOWN: Final = "unknown_transaction"


def _nothing_undecided(model: Model) -> Iterator[Violation]:
    for (group, message), deliveries in model.deliveries.items():
        transaction = model.transaction_of.get(message)
        if transaction is None:
            continue
        commits = transaction.tried("commit")
        began = commits[0].invoked.at if commits else float("inf")
        if any(delivery.event.at < began for delivery in deliveries):
            rule = "I4" if transaction.confirmed("rollback") is not None else "I3"
            yield Violation(rule, message, group, "delivered, and nobody had committed it")
        elif transaction.confirmed("rollback") is not None:
            yield Violation("I4", message, group, "delivered, though its rollback was confirmed")
        elif transaction.local is False:
            yield Violation("I4", message, group, "delivered, though its local transaction was rolled back")
    for group, message in model.dead:
        transaction = model.transaction_of.get(message)
        if transaction is not None and not transaction.tried("commit"):
            yield Violation("I3", message, group, "a dead letter, and nobody had committed it")


def _nothing_undecided_counted(model: Model) -> Iterator[Violation]:
    for waiting in model.waiting:
        possible = sum(
            call.invoked.topic == waiting.topic
            and call.invoked.at <= waiting.at
            and any(one.outcome != "refused" for one in calls)
            and model.matching(waiting.group, call.invoked.topic, call.invoked.message_type, sure_at=None)
            for calls in model.calls.values()
            for call in calls[:1]
        )
        if waiting.messages > possible:
            text = f"{waiting.messages} messages of topic {waiting.topic} wait, but only {possible} can be deliverable"
            yield Violation("I3", "", waiting.group, text)


def _one_decision(model: Model) -> Iterator[Violation]:
    for transaction in model.transactions.values():
        commit, rollback = transaction.confirmed("commit"), transaction.confirmed("rollback")
        if commit is not None and rollback is not None:
            rule = "I4" if rollback.at <= commit.invoked.at else "I5"
            yield Violation(rule, transaction.id, "", "its commit was confirmed, and its rollback too")
        for decision in transaction.decisions:
            what, at = decision.invoked.decision, decision.invoked.at
            opposite = transaction.tried("rollback" if what == "commit" else "commit")
            if decision.outcome == CONFLICT and not any(one.invoked.at <= decision.at for one in opposite):
                yield Violation("I5", transaction.id, "", f"its {what} was refused, and nobody had decided otherwise")
            if decision.outcome != UNKNOWN or decision.invoked.producer != transaction.producer:
                continue
            earlier = [one for one in transaction.decisions if one.outcome == "ok" and one.at <= at]
            if any(one.invoked.decision in {"commit", "rollback"} for one in earlier):
                yield Violation("I5", transaction.id, "", f"its {what} was refused: the decision is forgotten")
            elif transaction.prepared_at <= at:
                yield Violation("I7", transaction.id, "", f"its {what} was refused: the transaction is forgotten")


def _kept_until_decided(model: Model) -> Iterator[Violation]:
    for transaction in model.transactions.values():
        producers = {asked.group for asked in transaction.asked} - {transaction.producer}
        for group in sorted(producers):
            yield Violation("I7", transaction.id, group, f"asked about a transaction of {transaction.producer}")
        yield from _asked_who_publishes(model, transaction)
        foreign = [one for one in transaction.decisions if one.invoked.producer != transaction.producer]
        for decision in foreign:
            if decision.outcome == "ok" and decision.invoked.decision in {"commit", "rollback"}:
                text = f"decided a transaction of {transaction.producer}"
                yield Violation("I7", transaction.id, decision.invoked.producer, text)
        if transaction.state == "parked":
            answers = len(transaction.tried("unknown"))
            if answers < model.check_limit:
                text = f"parked after {answers} of {model.check_limit} answers that it is unknown"
                yield Violation("I7", transaction.id, "", text)
        if model.drained is None:
            continue
        tried = [*transaction.tried("commit"), *transaction.tried("rollback")]
        prepared = transaction.prepared_at < float("inf")
        if prepared and not tried and not transaction.state:
            yield Violation("I7", transaction.id, "", "prepared, decided by nobody, and the broker does not know it")
        if transaction.local is not None and transaction.state:
            text = f"still {transaction.state} at the end, though its producer was there to answer"
            yield Violation("I7", transaction.id, "", text)


def _asked_who_publishes(model: Model, transaction: Transaction) -> Iterator[Violation]:
    for asked in transaction.asked:
        connection = model.connections.get(asked.connection)
        if connection is None or connection.topics is None or asked.connection in transaction.connections:
            continue
        if not transaction.topics <= set(connection.topics):
            text = f"asked a client that publishes {connection.topics} about {sorted(transaction.topics)}"
            yield Violation("I7", transaction.id, asked.group, text)


def _all_or_none(model: Model) -> Iterator[Violation]:
    if model.drained is None:
        return
    for transaction in model.transactions.values():
        taken = [one for one in transaction.messages if one in transaction.durable and one not in transaction.refused]
        arrived: list[str] = []
        missing: list[str] = []
        for message in taken:
            first = model.calls[message][0].invoked
            for group in model.bounds:
                if not model.matching(group, first.topic, first.message_type, sure_at=first.at):
                    continue
                reached = model.deliveries.get((group, message)) or model.dead.get((group, message))
                (arrived if reached else missing).append(f"{message} to {group}")
        if arrived and missing:
            text = f"delivered were {', '.join(arrived)}, but never {', '.join(missing)}"
            yield Violation("I8", transaction.id, "", text)


TRANSACTION_RULES: Final[tuple[Callable[[Model], Iterator[Violation]], ...]] = (
    _nothing_undecided,
    _nothing_undecided_counted,
    _one_decision,
    _kept_until_decided,
    _all_or_none,
)
