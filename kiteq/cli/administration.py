"""`kiteq group`, `kiteq dlq` and `kiteq stat`: questions to a running broker, and their answers as text."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from kiteq.cli.failing import STATUS_USAGE, CommandFailed
from kiteq.cli.options import Broker, Json, Yes
from kiteq.cli.output import print_json, printable, table, time_text
from kiteq.cli.session import AdminSession

__all__ = ["dead_letters", "groups", "stat"]

DEFAULT_BROKER = "127.0.0.1:13800"

groups = typer.Typer(no_args_is_help=True, help="Groups of a running broker.", rich_markup_mode=None)
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


def _group_table(rows: list[dict[str, Any]]) -> str:
    titles = ("GROUP", "TOPIC", "BINDINGS", "MEMBERS", "PENDING", "BYTES", "IN FLIGHT", "RETRYING", "DEAD")
    names = ("members", "pending", "pending_bytes", "in_flight", "retrying", "dead")
    return table(
        titles,
        [
            (row["group"], row["topic"], ", ".join(map(_binding_text, row["bindings"])), *(row[name] for name in names))
            for row in rows
        ],
    )


@groups.command("list")
def group_list(*, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """List every group with what waits for it, topic by topic."""
    with AdminSession(broker) as session:
        rows = session.ask("group.list")
    if as_json:
        print_json(rows)
    else:
        print(_group_table(rows) if rows else "no group is bound")


@groups.command("show")
def group_show(group: Group, *, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """Show one group and its connections."""
    with AdminSession(broker) as session:
        shown = session.ask("group.show", group=group)
    if as_json:
        print_json(shown)
        return
    print(_group_table(shown["topics"]) if shown["topics"] else f"group {group} is bound to nothing")
    connections = shown["connections"]
    if not connections:
        print("\nno connections")
        return
    rows = [(row["client"], row["window"], row["in_flight"]) for row in connections]
    print("\n" + table(("CONNECTION", "WINDOW", "IN FLIGHT"), rows))


@groups.command("drop")
def group_drop(group: Group, *, broker: Broker = DEFAULT_BROKER, yes: Yes = False, as_json: Json = False) -> None:
    """Remove a group with its bindings and everything that waits for it."""
    with AdminSession(broker) as session:
        rows = session.ask("group.show", group=group)["topics"]
        owed = {name: sum(row[name] for row in rows) for name in ("pending", "retrying", "dead")}
        _confirm(
            f"dropping group {group} forgets {owed['pending']} pending, {owed['retrying']} retrying and "
            f"{owed['dead']} dead messages in {len(rows)} topics",
            yes=yes,
        )
    with AdminSession(broker) as session:  # anew: people think longer than an idle connection lasts
        dropped = session.ask("group.drop", group=group)
    if as_json:
        print_json(dropped)
    else:
        counts = ", ".join(f"{count} {name}" for name, count in dropped.items())
        print(f"dropped group {group}: {counts}")


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
    with AdminSession(broker) as session:
        rows = [row for row in session.ask("group.show", group=group)["topics"] if row["topic"] == topic]
        bound = [binding for row in rows for binding in row["bindings"]]
        if not any(binding["kind"] == kind and binding["pattern"] == pattern for binding in bound):
            told = ", ".join(map(_binding_text, bound)) or "nothing"
            raise CommandFailed(f"group {group} has no {kind} binding {pattern!r} to {topic}; it has {told}")
        last = f", its last one, {rows[0]['pending']} messages are pending" if len(bound) == 1 else ""
        _confirm(f"unsubscribing group {group} from {topic} removes its {kind} binding {pattern!r}{last}", yes=yes)
    with AdminSession(broker) as session:
        result = session.ask("group.unsubscribe", group=group, topic=topic, kind=kind, pattern=pattern)
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
    with AdminSession(broker) as session:
        rows = session.ask("dlq.list", group=group, topic=topic, limit=limit)
    if as_json:
        print_json(rows)
        return
    if not rows:
        print(f"group {group} has no dead letters")
        return
    titles = ("ID", "TOPIC", "TYPE", "DIED (UTC)", "ATTEMPTS", "BYTES", "REASON", "LAST ERROR")
    shown = [
        (
            row["id"], row["topic"], row["message_type"], time_text(row["at_ms"]), row["attempts"], row["bytes"],
            row["reason"], row["error"],
        )
        for row in rows
    ]  # fmt: skip
    print(table(titles, shown))


@dead_letters.command("show")
def dlq_show(
    group: Group,
    message_id: Annotated[str, typer.Argument(metavar="ID", show_default=False)],
    *,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """Show one dead letter with its history and body."""
    with AdminSession(broker) as session:
        letter = session.ask("dlq.show", group=group, id=message_id)
    if as_json:
        print_json(letter)
        return
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
    with AdminSession(broker) as session:
        result = session.ask("dlq.replay", group=group, topic=topic, id=message_id)
    if as_json:
        print_json(result)
    else:
        print(f"given to group {group} again: {result['replayed']}")


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
    with AdminSession(broker) as session:
        rows = session.ask("group.show", group=group)["topics"]
        count = 1 if message_id else sum(row["dead"] for row in rows if topic in (None, row["topic"]))
        where = f" of topic {topic}" if topic else ""
        _confirm(f"purging deletes {count} dead letters{where} of group {group}", yes=yes)
    with AdminSession(broker) as session:
        result = session.ask("dlq.purge", group=group, topic=topic, id=message_id)
    if as_json:
        print_json(result)
    else:
        print(f"deleted dead letters of group {group}: {result['purged']}")


def stat(*, broker: Broker = DEFAULT_BROKER, as_json: Json = False) -> None:
    """Show the counters of a running broker."""
    with AdminSession(broker) as session:
        counters = session.ask("stat")
    if as_json:
        print_json(counters)
        return
    rows: list[tuple[str, str]] = []
    for name, value in counters.items():
        if isinstance(value, dict):
            rows += [(f"{name}.{inner}", json.dumps(each, default=str)) for inner, each in sorted(value.items())]
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, default=str)))
    print(table(("COUNTER", "VALUE"), rows))
