"""The broker's flags, for every command that takes them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import typer

from kiteq import config
from kiteq.cli.failing import STATUS_USAGE, CommandFailed
from kiteq.errors import ConfigError

__all__ = ["Broker", "Json", "Yes", "given", "resolve", "with_server_flags"]


def _is_named(context: typer.Context, broker: str) -> str:
    # typer takes an empty variable for none, and the command would go to the broker of this machine.
    source = context.get_parameter_source("broker")
    if os.environ.get("KITEQ_BROKER") == "" and source is not None and source.name == "DEFAULT":
        raise CommandFailed("KITEQ_BROKER is empty; it must name a broker, like 127.0.0.1:13800", STATUS_USAGE)
    return broker


Broker = Annotated[
    str,
    typer.Option(
        "--broker",
        metavar="BROKERS",
        envvar="KITEQ_BROKER",
        callback=_is_named,
        help="HOST:PORT; or several brokers: kiteq://HOST:PORT,HOST:PORT or zk://HOST:2181 (KITEQ_ZK_AUTH).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

_HELP: Final = {
    "config": ("FILE", "TOML file with settings."),
    "bind": ("HOST:PORT", "Where to listen. [default: 127.0.0.1:13800]"),
    "advertise": ("HOST:PORT", "What to announce instead."),
    "pport": ("PORT", "Port of HTTP with /stat, /binds, /healthz and /metrics. [default: none]"),
    "topics": ("A,B,...", "Topics to serve. [default: every name]"),
    "zkhost": ("HOST:PORT,...", "ZooKeeper, where brokers and clients find each other. [default: embedded registry]"),
    "zk_timeout": ("TIME", "How long a broker that died is still found in ZooKeeper. [default: 10s]"),
    "workers": ("N", "Broker processes of this command, each with its own port and store. [default: 1]"),
    "db": ("URL", "Store: lmdb:///path, lmdb://./path, memory://, mock://. [default: lmdb://./kiteq-data]"),
    "flush": ("sync|async", "Receipts after or before the message is on disk. [default: sync]"),
    "store_limit": ("SIZE", "Largest size of the store. [default: 64GiB]"),
    "disk_free_min": ("SIZE", "Free disk below which publishing is refused. [default: 5 %, at least 1GiB]"),
    "message_limit": ("SIZE", "Largest body. [default: 1MiB]"),
    "group_quota": ("SIZE", "What one group may have waiting. [default: 16GiB]"),
    "connections": ("N", "Most connections at a time. [default: 1024]"),
    "ack_deadline": ("TIME", "Without an ack for this long a delivery has failed. [default: 60s]"),
    "max_hold": ("TIME", "The same, however often a client extends it. [default: 1h]"),
    "drain_timeout": ("TIME", "How long clients may finish when the broker stops. [default: 10s]"),
    "check_after": ("TIME", "From prepare to the first check of an open transaction. [default: 6s]"),
    "check_limit": ("N", "Answers 'unknown' before a transaction is parked. [default: 15]"),
    "checks_per_second": ("N", "Most checks asked in a second, over all groups. [default: 200]"),
    "check_elsewhere_after": ("TIME", "When another member of a gone producer's group is asked. [default: 30s]"),
    "half_quota": ("N", "Most open transactions of one group. [default: 1000000]"),
    "half_age_alarm": ("TIME", "A transaction undecided for longer is an alarm. [default: 600s]"),
    "handlers": ("MODULE:CLASS,...", "Own handlers to put into the pipeline."),
    "insecure": ("", "Let other machines in although there are no users."),
    "log_level": ("LEVEL", "debug, info, warning or error. [default: info]"),
    "log_format": ("FORMAT", "console, json, or auto: console on a terminal. [default: auto]"),
    **{name: ("", f"Not built yet: {feature}.") for name, feature in config.NOT_BUILT.items()},
}


def with_server_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command every flag of the broker in place of its `**flags`."""
    own = [
        parameter
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    added = []
    for name, (metavar, text) in _HELP.items():
        flag = f"--{name.replace('_', '-')}"
        option: Any
        kind: Any
        if name == "insecure":
            option, kind = typer.Option(flag, help=text, show_default=False), bool | None
        else:
            option, kind = typer.Option(flag, metavar=metavar or "VALUE", help=text, show_default=False), str | None
        added.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )
    parameters = [*own, *added]
    # typer reads a command from these two attributes; it does not know of `**flags`.
    described: Any = function
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def given(flags: Mapping[str, object]) -> dict[str, object]:
    """Return the flags that stand on the command line."""
    return {name: value for name, value in flags.items() if value is not None}


def resolve(flags: Mapping[str, object]) -> config.Resolved:
    """Return the settings of these flags, the environment and the file. Raises `ConfigError`."""
    import os
    from pathlib import Path

    values = given(flags)
    path = values.pop("config", None)
    if path == "":
        raise ConfigError("--config is empty; name a TOML file or leave it out")
    return config.load(values, os.environ, None if path is None else Path(str(path)))
