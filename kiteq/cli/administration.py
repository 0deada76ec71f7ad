"""`kiteq group`, `kiteq dlq` and `kiteq stat`: questions to a running broker, and their answers as text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Annotated, Any, Final

import typer

from kiteq.cli.cluster import Cluster
from kiteq.cli.failing import STATUS_USAGE, CommandFailed
from kiteq.cli.options import Broker, Json, Yes
from kiteq.cli.output import print_json, printable, time_text

__all__ = ["dead_letters", "groups", "stat"]

DEFAULT_BROKER = "127.0.0.1:13800"
OWED: Final = ("pending", "retrying", "dead")
LETTER_TITLES: Final = ("ID", "TOPIC", "TYPE", "DIED (UTC)", "ATTEMPTS", "BYTES", "REASON", "LAST ERROR")

groups = typer.Typer(no_args_is_help=True, help="Groups of running brokers.", rich_markup_mode=None)
dead_letters = typer.Typer(no_args_is_help=True, help="Dead letters of a group.", rich_markup_mode=None)

Group = Annotated[str, typer.Argument(metavar="GROUP", show_default=False)]
Topic = Annotated[str | None, typer.Option("--topic", metavar="TOPIC", help="Only of this topic.")]
OneId = Annotated[str | None, typer.Argument(metavar="[ID]", help="Only this message.", show_default=False)]


def _confirm(question: str, *, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise CommandFailed(f"{question}: say --yes to do this without being asked", STATUS_USAGE)
    if not typer.confirm(f"{question}. Go on?"):
        raise CommandFailed("nothing was changed")


def _binding_text(binding: dict[str, Any]) -> str:
    text = binding["kind"] if binding["kind"] == "fanout" else f"{binding['kind']} {binding['pattern']}"
    return f"{text}{'' if binding['persistent'] else ' (temporary)'}"


def _group_table(brokers: Cluster, rows: list[dict[str, Any]]) -> str:
    titles = ("GROUP", "TOPIC", "BINDINGS", "MEMBERS", "PENDING", "BYTES", "IN FLIGHT", "RETRYING", "DEAD")
    names = ("members", "pending", "pending_bytes", "in_flight", "retrying", "dead")
    return brokers.table(
        titles,
        rows,
        lambda row: (
            row["group"], row["topic"], ", ".join(map(_binding_text, row["bindings"])), *(row[name] for name in names),
        ),
    )  # fmt: skip


@groups.command("list")
def group_list(*, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """List every group with what waits for it, topic by topic."""
    with Cluster(broker) as brokers:
        rows = brokers.rows(brokers.ask("group.list"))
        rows.sort(key=lambda row: (row["group"], row["topic"]))
        if as_json:
            print_json(rows)
        else:
            print(_group_table(brokers, rows) if rows else "no group is bound")


@groups.command("show")
def group_show(group: Group, *, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """Show one group and its connections."""
    with Cluster(broker) as brokers:
        answers = brokers.ask("group.show", group=group)
        topics, connections = (
            [brokers.marked(address, row) for address, shown in answers for row in shown[part]]
            for part in ("topics", "connections")
        )
        if as_json:
            print_json({"group": group, "topics": topics, "connections": connections})
            return
        topics.sort(key=lambda row: row["topic"])
        print(_group_table(brokers, topics) if topics else f"group {group} is bound to nothing")
        if not connections:
            print("\nno connections")
            return
        titles = ("CONNECTION", "WINDOW", "IN FLIGHT")
        rows = brokers.table(titles, connections, lambda row: (row["client"], row["window"], row["in_flight"]))
        print(f"\n{rows}")


@groups.command("drop")
def group_drop(group: Group, *, broker: Broker = DEFAULT_BROKER, yes: Yes = False, as_json: Json = False) -> None:
    """Remove a group with its bindings and everything that waits for it."""
    with Cluster(broker) as brokers:
        shown = {address: one["topics"] for address, one in brokers.ask("group.show", group=group)}
        owed = {address: {name: sum(row[name] for row in rows) for name in OWED} for address, rows in shown.items()}
        total = _summed(owed.values())
        topics = {row["topic"] for rows in shown.values() for row in rows}
        _confirm(
            f"dropping group {group} forgets {total['pending']} pending, {total['retrying']} retrying and "
            f"{total['dead']} dead messages in {len(topics)} topics",
            yes=yes,
        )
        # A broker may have heard of it from another one, through the registry, before it is asked itself.
        dropped = _summed((owed | dict(brokers.ask("group.drop", group=group))).values())
        if as_json:
            print_json(dropped)
        else:
            counts = ", ".join(f"{count} {name}" for name, count in dropped.items())
            print(f"dropped group {group}: {counts}")


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    each = list(counts)
    return {name: sum(one[name] for one in each) for name in OWED}


@groups.command("unsubscribe")
def group_unsubscribe(
    group: Group,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", show_default=False)],
    message_type: Annotated[str | None, typer.Argument(metavar="[TYPE]", show_default=False)] = None,
    *,
    regex: Annotated[str | None, typer.Option("--regex", metavar="P", help="The pattern of a regex binding.")] = None,
    broker: Broker = DEFAULT_BROKER,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove one binding: of TYPE, of --regex P, or with neither the one to every type."""
    if message_type is not None and regex is not None:
        raise CommandFailed("give TYPE or --regex, not both", STATUS_USAGE)
    kind, pattern = ("regex", regex) if regex is not None else ("direct", message_type)
    if pattern is None:
        kind, pattern = "fanout", "*"
    with Cluster(broker) as brokers:
        shown = [row for told in brokers.ask("group.show", group=group) for row in told.result["topics"]]
        rows = [row for row in shown if row["topic"] == topic]
        bound = {(one["kind"], one["pattern"]): one for row in rows for one in row["bindings"]}
        if (kind, pattern) not in bound:
            told = ", ".join(map(_binding_text, bound.values())) or "nothing"
            raise CommandFailed(f"group {group} has no {kind} binding {pattern!r} to {topic}; it has {told}")
        pending = sum(row["pending"] for row in rows)
        last = f", its last one, {pending} messages are pending" if len(bound) == 1 else ""
        _confirm(f"unsubscribing group {group} from {topic} removes its {kind} binding {pattern!r}{last}", yes=yes)
        answers = brokers.ask("group.unsubscribe", group=group, topic=topic, kind=kind, pattern=pattern)
        result = {
            "removed": any(told.result["removed"] for told in answers),
            "pending": sum(told.result["pending"] for told in answers),
            "bound": any(told.result["bound"] for told in answers),
        }
        if as_json:
            print_json(result)
        elif result["removed"]:
            print(f"removed the {kind} binding {pattern!r} of group {group} to {topic}")
        else:
            raise CommandFailed(f"group {group} has no {kind} binding {pattern!r} to {topic} any more")


@dead_letters.command("list")
def dlq_list(
    group: Group,
    *,
    topic: Topic = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most so many.")] = 100,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """List dead letters of a group."""
    with Cluster(broker) as brokers:
        rows = brokers.rows(brokers.ask("dlq.list", group=group, topic=topic, limit=limit))
        if brokers.several:
            rows = sorted(rows, key=lambda row: (row["topic"], row["at_ms"]))[:limit]
        if as_json:
            print_json(rows)
        elif not rows:
            print(f"group {group} has no dead letters")
        else:
            print(brokers.table(LETTER_TITLES, rows, _letter_cells))


def _letter_cells(row: dict[str, Any]) -> tuple[object, ...]:
    return (
        row["id"], row["topic"], row["message_type"], time_text(row["at_ms"]), row["attempts"], row["bytes"],
        row["reason"], row["error"],
    )  # fmt: skip


@dead_letters.command("show")
def dlq_show(
    group: Group,
    message_id: Annotated[str, typer.Argument(metavar="ID", show_default=False)],
    *,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """Show one dead letter with its history and body."""
    with Cluster(broker) as brokers:
        address, found = brokers.ask("dlq.show", group=group, id=message_id)[0]
        letter = brokers.marked(address, found)
        if as_json:
            print_json(letter)
        else:
            _print_letter(letter)


def _print_letter(letter: dict[str, Any]) -> None:
    if "broker" in letter:
        print(f"{'broker':<13}{letter['broker']}")
    for name in ("id", "topic", "message_type", "reason", "error", "attempts"):
        print(f"{name:<13}{printable(str(letter[name]).encode())}")
    print(f"{'died':<13}{time_text(letter['at_ms'])} UTC")
    for name, value in letter["properties"].items():
        print(f"{'property':<13}{printable(f'{name}={value}'.encode())}")
    for failure in letter["history"]:
        told = printable(f"{failure['client']}: {failure['error']}".encode())
        print(f"{'failed':<13}{time_text(failure['at_ms'])} {told}")
    print(f"\n{printable(letter['body'])}")


@dead_letters.command("replay")
def dlq_replay(
    group: Group,
    message_id: OneId = None,
    *,
    topic: Topic = None,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """Give dead letters to their group again: one, those of a topic, or all."""
    with Cluster(broker) as brokers:
        answers = brokers.ask("dlq.replay", group=group, topic=topic, id=message_id)
        replayed = sum(told.result["replayed"] for told in answers)
        if as_json:
            print_json({"replayed": replayed})
        else:
            print(f"given to group {group} again: {replayed}")


@dead_letters.command("purge")
def dlq_purge(
    group: Group,
    message_id: OneId = None,
    *,
    topic: Topic = None,
    broker: Broker = DEFAULT_BROKER,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete dead letters: one, those of a topic, or all."""
    with Cluster(broker) as brokers:
        rows = [row for told in brokers.ask("group.show", group=group) for row in told.result["topics"]]
        count = 1 if message_id else sum(row["dead"] for row in rows if topic in (None, row["topic"]))
        where = f" of topic {topic}" if topic else ""
        _confirm(f"purging deletes {count} dead letters{where} of group {group}", yes=yes)
        answers = brokers.ask("dlq.purge", group=group, topic=topic, id=message_id)
        purged = sum(told.result["purged"] for told in answers)
        if as_json:
            print_json({"purged": purged})
        else:
            print(f"deleted dead letters of group {group}: {purged}")


def stat(*, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """Show the counters of a running broker, or of several."""
    with Cluster(broker) as brokers:
        answers = brokers.ask("stat")
        if as_json:
            shown = [brokers.marked(address, counters) for address, counters in answers]
            print_json(shown if brokers.several else shown[0])
            return
        rows = [
            brokers.marked(address, {"counter": name, "value": value})
            for address, counters in answers
            for name, value in _counter_rows(counters)
        ]
        print(brokers.table(("COUNTER", "VALUE"), rows, lambda row: (row["counter"], row["value"])))


def _counter_rows(counters: dict[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in counters.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{inner}", json.dumps(each, default=str)) for inner, each in sorted(value.items())]
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, default=str)))
    return rows
