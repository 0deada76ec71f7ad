"""The commands of `kiteq`; what a command needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from kiteq.cli.administration import DEFAULT_BROKER, dead_letters, groups, stat
from kiteq.cli.brokers import broker_commands
from kiteq.cli.failing import STATUS_USAGE, CommandFailed
from kiteq.cli.options import Broker, Json, given, resolve, with_server_flags
from kiteq.cli.output import print_json, table
from kiteq.cli.top import top
from kiteq.cli.transactions import message_commands, transaction_commands

__all__ = ["app"]

SIZES = frozenset({"store_limit", "disk_free_min", "message_limit", "group_quota"})
"""Settings whose whole numbers are bytes."""

HELP_FLAGS = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=HELP_FLAGS
)
settings_commands = typer.Typer(no_args_is_help=True, help="Settings of a broker.", rich_markup_mode=None)
app.add_typer(broker_commands, name="broker")
app.add_typer(groups, name="group")
app.add_typer(dead_letters, name="dlq")
app.add_typer(transaction_commands, name="tx")
app.add_typer(message_commands, name="msg")
app.add_typer(settings_commands, name="config")
app.command("stat")(stat)
app.command("top")(top)

Topic = Annotated[str, typer.Argument(metavar="TOPIC", show_default=False)]
OptionalType = Annotated[str | None, typer.Argument(metavar="[TYPE]", show_default=False)]


@app.callback(invoke_without_command=True)
@with_server_flags
def start(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the versions and leave.")] = False,
    **flags: Any,
) -> None:
    """Start a broker, or with a command: send, listen, and administer a running one."""
    if version:
        from kiteq.cli.version import version_text

        print(version_text())
        raise typer.Exit
    if context.invoked_subcommand is not None:
        _refuse_before_command(flags, context.invoked_subcommand)
        return
    resolved = resolve(flags)
    from kiteq.workers.plan import check_left_over

    check_left_over(resolved.settings)
    if resolved.settings.workers > 1:
        from kiteq.cli.workers import run
    else:
        from kiteq.cli.serve import run
    run(resolved)


def _refuse_before_command(flags: Mapping[str, Any], command: str) -> None:
    for name in given(flags):
        flag = f"--{name.replace('_', '-')}"
        raise CommandFailed(
            f"{flag} is a flag of the broker and has no meaning before the command {command!r}", STATUS_USAGE
        )


@app.command()
def send(
    topic: Topic,
    message_type: Annotated[str, typer.Argument(metavar="TYPE", show_default=False)],
    body: Annotated[str, typer.Argument(metavar="[BODY|-]", help="- reads standard input.", show_default=False)] = "",
    *,
    broker: Broker = DEFAULT_BROKER,
    group: Annotated[str, typer.Option("--group", help="The group to send as.")] = "kiteq-cli",
    properties: Annotated[
        list[str] | None, typer.Option("--property", metavar="NAME=VALUE", help="A property; may be repeated.")
    ] = None,
    ttl: Annotated[str | None, typer.Option("--ttl", metavar="TIME", help="Time to live, like 60s.")] = None,
    delay: Annotated[str | None, typer.Option("--delay", metavar="TIME", help="Deliver that much later.")] = None,
    deliver_at: Annotated[
        str | None,
        typer.Option("--deliver-at", metavar="TIME", help="Deliver then, like 2030-12-24T18:00; local without a zone."),
    ] = None,
    message_id: Annotated[str | None, typer.Option("--id", metavar="HEX", help="The id, 32 hex digits.")] = None,
    fly: Annotated[bool, typer.Option("--fly", help="Never stored: only for who listens now.")] = False,
) -> None:
    """Send one message and print its receipt."""
    from kiteq.cli import messages

    messages.send(
        messages.Sending(
            topic=topic,
            message_type=message_type,
            body=body,
            broker=broker,
            group=group,
            properties=properties or (),
            ttl=ttl,
            delay=delay,
            deliver_at=deliver_at,
            message_id=message_id,
            fly=fly,
        )
    )


@app.command()
def listen(
    topic: Topic,
    message_type: OptionalType = None,
    *,
    regex: Annotated[str | None, typer.Option("--regex", metavar="P", help="Message types that match, whole.")] = None,
    group: Annotated[
        str | None, typer.Option("--group", help="A persistent group of this name; else a temporary one.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", min=1, metavar="N", help="Leave after N messages.")] = None,
    broker: Broker = DEFAULT_BROKER,
    as_json: Json = False,
) -> None:
    """Print messages of a topic as they come."""
    from kiteq.cli import messages

    messages.listen(
        messages.Listening(
            topic=topic,
            message_type=message_type,
            pattern=regex,
            broker=broker,
            group=group,
            count=count,
            as_json=as_json,
        )
    )


@app.command()
def pipeline() -> None:
    """Print the handlers a message passes, in order."""
    from kiteq.pipe.pipeline import describe

    print(describe())


@settings_commands.command("check")
@with_server_flags
def config_check(**flags: Any) -> None:
    """Check flags, environment and file, and start nothing."""
    resolved = resolve(flags)
    for variable, nearest in resolved.misspelt:
        print(f"{variable} is not a setting and is ignored; did you mean {nearest}?")
    print("the settings are valid")


@settings_commands.command("show")
@with_server_flags
def config_show(*, as_json: Json = False, **flags: Any) -> None:
    """Print each setting with its value and where that comes from."""
    resolved = resolve(flags)
    values = {field.name: getattr(resolved.settings, field.name) for field in fields(resolved.settings)}
    if as_json:
        print_json({name: {"value": value, "source": resolved.sources[name]} for name, value in values.items()})
        return
    rows = [(name, _value_text(name, value), resolved.sources[name]) for name, value in values.items()]
    print(table(("SETTING", "VALUE", "SOURCE"), rows))


def _value_text(name: str, value: object) -> str:
    from kiteq.values import seconds_text, size_text

    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(value) or ("any" if name == "topics" else "-")
    if isinstance(value, float):
        return seconds_text(value)
    if isinstance(value, int) and name in SIZES:
        return size_text(value)
    return str(value)
