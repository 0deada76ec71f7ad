"""`kiteq tx` and `kiteq msg`: transactions nobody has decided yet, and delayed messages."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Final

import typer

from kiteq.cli.administration import DEFAULT_BROKER
from kiteq.cli.cluster import Cluster
from kiteq.cli.failing import STATUS_USAGE, CommandFailed
from kiteq.cli.options import Broker, Json
from kiteq.cli.output import age_text, print_json, printable, table, time_text
from kiteq.values import Given, WrongValue, duration

__all__ = ["message_commands", "transaction_commands"]

transaction_commands = typer.Typer(no_args_is_help=True, help="Transactions of running brokers.", rich_markup_mode=None)
message_commands = typer.Typer(no_args_is_help=True, help="Delayed messages of running brokers.", rich_markup_mode=None)

AGE_SECONDS_MAX: Final = 10 * 365 * 86_400.0
ID_PATTERN: Final = re.compile("[0-9a-fA-F]{32}", re.ASCII)

Id = Annotated[str, typer.Argument(metavar="ID", show_default=False)]
OfGroup = Annotated[str | None, typer.Option("--group", metavar="GROUP", help="Only of this producer group.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for the audit log.", show_default=False)]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most so many.")]


class State(StrEnum):
    """What `tx list` can be asked for."""

    OPEN = "open"
    PARKED = "parked"
    DECIDED = "decided"


def _checked_id(text: str) -> str:
    if ID_PATTERN.fullmatch(text) is None:
        raise CommandFailed(f"ID is {text!r}; it must be 32 hex digits", STATUS_USAGE)
    return text.lower()


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(str(duration(0.0, AGE_SECONDS_MAX)(Given(text, "--older-than", is_toml=False))))
    except WrongValue:
        raise CommandFailed(f"--older-than is {text!r}; it must be a time like 90s, 10m or 2h", STATUS_USAGE) from None


@transaction_commands.command("list")
def tx_list(
    *,
    state: Annotated[
        State | None, typer.Option("--state", help="Only these. [default: open and parked]", show_default=False)
    ] = None,
    group: OfGroup = None,
    topic: Annotated[str | None, typer.Option("--topic", metavar="TOPIC", help="Only of this topic.")] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="TIME", help="Only prepared longer ago, like 90s, 10m, 2h.")
    ] = None,
    limit: Limit = 100,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """List transactions, the oldest first."""
    older_than_s = _seconds(older_than)
    with Cluster(broker) as brokers:
        answers = brokers.ask(
            "tx.list",
            state=None if state is None else state.value,
            group=group,
            topic=topic,
            older_than_s=older_than_s,
            limit=limit,
        )
        rows = brokers.rows(answers)
        decided = state is State.DECIDED
        if brokers.several:
            rows.sort(key=lambda row: -row["decided_ms"] if decided else row["prepared_ms"])
            del rows[limit:]
        if as_json:
            print_json(rows)
        elif not rows:
            print(f"no transaction is {'open or parked' if state is None else state.value}, as far as asked for")
        else:
            print(_decided_table(brokers, rows) if decided else _undecided_table(brokers, rows))


def _undecided_table(brokers: Cluster, rows: list[dict[str, Any]]) -> str:
    titles = ("ID", "STATE", "GROUP", "TOPICS", "MESSAGES", "AGE", "ASKED", "UNKNOWN", "NEXT CHECK (UTC)")
    return brokers.table(
        titles,
        rows,
        lambda row: (
            row["id"], row["state"], row["group"], ", ".join(row["topics"]), row["messages"], age_text(row["age_s"]),
            row["asks"], row["unknowns"], _time_or_dash(row["next_check_ms"]),
        ),
    )  # fmt: skip


def _decided_table(brokers: Cluster, rows: list[dict[str, Any]]) -> str:
    titles = ("ID", "DECISION", "DECIDED (UTC)", "BY", "GROUP", "TOPICS", "MESSAGES")
    return brokers.table(
        titles,
        rows,
        lambda row: (
            row["id"], row["decision"], _time_or_dash(row["decided_ms"]), row["decided_by"] or "-", row["group"],
            ", ".join(row["topics"]) or "-", "-" if row["messages"] is None else row["messages"],
        ),
    )  # fmt: skip


def _time_or_dash(epoch_ms: int | None) -> str:
    return "-" if epoch_ms is None else time_text(epoch_ms)


@transaction_commands.command("show")
def tx_show(transaction_id: Id, *, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """Show one transaction, with each check: when, who was asked, what was answered."""
    checked = _checked_id(transaction_id)
    with Cluster(broker) as brokers:
        address, found = brokers.ask("tx.show", id=checked)[0]
        shown = brokers.marked(address, found)
        if as_json:
            print_json(shown)
        else:
            _print_transaction(shown)


def _print_transaction(shown: dict[str, Any]) -> None:
    if "broker" in shown:
        print(f"{'broker':<14}{shown['broker']}")
    for name, value in _described(shown):
        print(f"{name:<14}{printable(value.encode())}")
    message = shown["message"]
    if message is not None:
        for name, value in message["properties"].items():
            print(f"{'property':<14}{printable(f'{name}={value}'.encode())}")
    checks = shown["checks"]
    if not checks:
        print("\nit was not asked about")
        return
    rows = [
        (time_text(one["at_ms"]), one["client"], one["answer"] or "no answer", _time_or_dash(one["answered_ms"]))
        for one in checks
    ]
    print("\n" + table(("CHECK (UTC)", "ASKED", "ANSWER", "ANSWERED (UTC)"), rows))


def _described(shown: dict[str, Any]) -> list[tuple[str, str]]:
    message = shown["message"]
    times = {"prepared": "prepared_ms", "parked": "parked_ms", "next check": "next_check_ms", "decided": "decided_ms"}
    lines = [("id", shown["id"]), ("state", shown["state"]), ("group", shown["group"])]
    if shown["decision"] is not None:
        lines.append(("decision", f"{shown['decision']}, by {shown['decided_by']}"))
    if shown["reason"] is not None:
        lines.append(("reason", shown["reason"]))
    lines += [(name, f"{time_text(shown[key])} UTC") for name, key in times.items() if shown[key] is not None]
    if shown["decision"] is None:
        lines += [
            ("age", age_text(shown["age_s"])),
            ("prepared by", f"client {shown['instance']}"),
            ("asked", f"{shown['asks']} times, {shown['unknowns']} times answered with unknown"),
        ]
    if message is not None:
        lines.append(("messages", f"{shown['messages']} for {', '.join(shown['topics'])}"))
        lines.append(("first message", f"{message['topic']} {message['message_type']}, {message['bytes']} bytes"))
    return lines


def _decide(verb: str, transaction_id: str, reason: str, broker: str, *, as_json: bool) -> None:
    checked = _checked_id(transaction_id)
    if not reason.strip():
        raise CommandFailed("--reason is empty; say why, for the audit log", STATUS_USAGE)
    with Cluster(broker) as brokers:
        address, result = brokers.ask_holder("tx.show", f"tx.{verb}", id=checked, reason=reason)
        if as_json:
            print_json(brokers.marked(address, result))
        elif result["changed"]:
            print(f"{result['decision']}: {result['id']}")
        else:
            print(f"nothing changed, {result['id']} was decided before: {result['decision']}")


@transaction_commands.command("commit")
def tx_commit(transaction_id: Id, *, reason: Reason, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """Commit a transaction by hand: its messages are delivered. This is final."""
    _decide("commit", transaction_id, reason, broker, as_json=as_json)


@transaction_commands.command("rollback")
def tx_rollback(transaction_id: Id, *, reason: Reason, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """Roll a transaction back by hand: nobody gets its messages. This is final."""
    _decide("rollback", transaction_id, reason, broker, as_json=as_json)


@transaction_commands.command("resume")
def tx_resume(transaction_id: Id, *, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """Let the checks of a parked transaction begin again."""
    checked = _checked_id(transaction_id)
    with Cluster(broker) as brokers:
        address, result = brokers.ask_holder("tx.show", "tx.resume", id=checked)
        if as_json:
            print_json(brokers.marked(address, result))
        elif result["resumed"]:
            print(f"{result['id']} will be asked about again")
        else:
            print(f"nothing changed, {result['id']} is not parked")


@transaction_commands.command("audit")
def tx_audit(*, limit: Limit = 100, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """List decisions by hand, the latest first."""
    with Cluster(broker) as brokers:
        rows = brokers.rows(brokers.ask("tx.audit", limit=limit))
        if brokers.several:
            rows = sorted(rows, key=lambda row: -row["at_ms"])[:limit]
        if as_json:
            print_json(rows)
        elif not rows:
            print("nothing was decided by hand")
        else:
            print(brokers.table(("WHEN (UTC)", "DONE", "ID", "GROUP", "BY", "REASON"), rows, _audit_cells))


def _audit_cells(row: dict[str, Any]) -> tuple[object, ...]:
    return (time_text(row["at_ms"]), row["verb"], row["id"], row["group"], row["client"], row["reason"])


@message_commands.command("cancel")
def msg_cancel(
    message_id: Id, *, group: OfGroup = None, broker: Broker = DEFAULT_BROKER, as_json: Json = False
) -> None:
    """Cancel a delayed message before it is due."""
    checked = _checked_id(message_id)
    with Cluster(broker) as brokers:
        cancelled = sum(told.result["cancelled"] for told in brokers.ask("msg.cancel", id=checked, group=group))
        if as_json:
            print_json({"cancelled": cancelled})
        else:
            print(f"cancelled: {cancelled}")
