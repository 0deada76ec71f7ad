"""`kiteq send` and `kiteq listen`: the client, for people at a terminal."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from datetime import datetime
from io import StringIO

import trio
import typer

from kiteq.binding.bindings import Binding
from kiteq.cli.cluster import Cluster
from kiteq.cli.failing import STATUS_USAGE, CommandFailed, sole
from kiteq.cli.finding import LIST_SCHEME, is_registry
from kiteq.cli.output import body_fields, print_json, printable
from kiteq.errors import KiteQError, NotConnected
from kiteq.limits import DELAY_MS_MAX, TTL_MS_MAX
from kiteq.message import Receipt
from kiteq.values import Given, WrongValue, duration
from kiteq_client import Client, Message, Received, direct, fanout, regex

__all__ = ["Listening", "Sending", "listen", "send"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What `kiteq send` was asked for; a body of "-" is read from standard input."""

    topic: str
    message_type: str
    body: str
    broker: str
    group: str
    properties: Sequence[str]
    ttl: str | None
    delay: str | None
    deliver_at: str | None
    message_id: str | None
    fly: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """What `kiteq listen` was asked for."""

    topic: str
    message_type: str | None
    pattern: str | None
    broker: str
    group: str | None
    count: int | None
    as_json: bool


def send(asked: Sending) -> None:
    """Send one message and print its receipt."""
    try:
        message = Message(
            asked.topic,
            asked.message_type,
            _body(asked.body),
            id=asked.message_id,
            properties=_properties(asked.properties),
            ttl=_seconds("--ttl", asked.ttl, (0.001, TTL_MS_MAX / 1000), "a time from 0.001s to 7d, like 60s"),
            delay=_seconds("--delay", asked.delay, (0, DELAY_MS_MAX / 1000), "a time from 0s to 366d, like 90s"),
            deliver_at=_moment(asked.deliver_at),
            fly=asked.fly,
        )
        message.encoded()
        client = Client(_client_url(asked.broker), group=asked.group, topics=[asked.topic])
    except ValueError as error:
        raise CommandFailed(str(error), STATUS_USAGE) from None

    async def run() -> Receipt:
        async with client:
            return await client.send(message)

    with _told_plainly(asked.broker):
        receipt = trio.run(run)
    print(_receipt_text(message, receipt), flush=True)


def _client_url(broker: str) -> str:
    return broker if is_registry(broker) else f"{LIST_SCHEME}{broker.removeprefix(LIST_SCHEME)}"


@contextmanager
def _told_plainly(broker: str) -> Iterator[None]:
    # One sentence says it all; without a handler the client's own warnings would stand beside it.
    logging.getLogger("kiteq_client").addHandler(logging.NullHandler())
    try:
        yield
    except (NotConnected, ExceptionGroup) as error:
        alone = sole(error)
        if not isinstance(alone, NotConnected):
            raise
        if is_registry(broker):  # the client says what is missing: the registry, or somebody who serves the topic
            raise NotConnected(re.sub(r"\[Errno -?\d+\] ", "", str(alone))) from error
        # The innermost reason comes last; an error number says nothing to a person.
        reason = re.sub(r"^\[errno -?\d+\] ", "", str(alone).rpartition(": ")[2].lower())
        raise NotConnected(f"no broker answers at {broker}: {reason}; is one running there?") from error


def _body(text: str) -> str | bytes:
    if text == "-":
        return sys.stdin.buffer.read()
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text)  # the bytes as they were typed
    return text


def _properties(pairs: Sequence[str]) -> dict[str, str]:
    properties = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise CommandFailed(f"--property is {pair!r}; it must be NAME=VALUE", STATUS_USAGE)
        properties[name] = value
    return properties


def _seconds(flag: str, text: str | None, bounds: tuple[float, float], allowed: str) -> float | None:
    if text is None:
        return None
    try:
        return float(str(duration(*bounds)(Given(text, flag, is_toml=False))))
    except WrongValue:
        raise CommandFailed(f"{flag} is {text!r}; it must be {allowed}", STATUS_USAGE) from None


def _moment(text: str | None) -> datetime | None:
    """Return a date and time; one without a zone is of this machine's."""
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        example = "2030-12-24T18:00 or 2030-12-24T18:00:00+01:00"
        reason = f"--deliver-at is {text!r}; it must be a date and time, like {example}"
        raise CommandFailed(reason, STATUS_USAGE) from None


def _receipt_text(message: Message, receipt: Receipt) -> str:
    shown = f"id={receipt.message_id.hex()}"
    if receipt.duplicate:
        return f"already accepted before, stored once: {shown}"
    if receipt.groups is None:
        return f"{'stored' if receipt.durable else 'accepted'} until its time comes: {shown}"
    text = f"{'stored' if receipt.durable else 'accepted'}: {shown} groups={receipt.groups}"
    if receipt.groups == 0:
        where = f"{message.topic} {message.message_type}"
        text += f"\nno group is bound to {where}; "
        text += "the message is gone" if message.fly else 'it is kept for a group that binds with start="first"'
    return text


def listen(asked: Listening) -> None:
    """Print messages until interrupted, or until `count` have come."""
    group = asked.group or f"listen-{secrets.token_hex(4)}"
    try:
        binding = _binding(asked)
        client = Client(_client_url(asked.broker), group=group, bindings=[binding])
    except ValueError as error:
        raise CommandFailed(str(error), STATUS_USAGE) from None
    try:
        with _told_plainly(asked.broker):
            trio.run(_listen, client, binding, asked)
    finally:
        if asked.group is None:
            # A broker that is gone or far away drops a group that is not persistent by itself.
            with suppress(KiteQError, typer.Exit), redirect_stderr(StringIO()), Cluster(asked.broker) as brokers:
                brokers.ask("group.drop", group=group)


def _binding(asked: Listening) -> Binding:
    persistent = asked.group is not None
    if asked.message_type is not None and asked.pattern is not None:
        raise CommandFailed("give TYPE or --regex, not both", STATUS_USAGE)
    if asked.message_type is not None:
        return direct(asked.topic, asked.message_type, persistent=persistent)
    if asked.pattern is not None:
        return regex(asked.topic, asked.pattern, persistent=persistent)
    return fanout(asked.topic, persistent=persistent)


async def _listen(client: Client, binding: Binding, asked: Listening) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_when_asked, signals, nursery)
            async with client:
                logging.getLogger("kiteq_client").addHandler(logging.StreamHandler())  # lost connections from now on
                what = {"DIRECT": f"type {binding.pattern}", "REGEX": f"types like {binding.pattern}"}
                said = what.get(binding.kind.name, "every type")
                print(
                    f"listening to {binding.topic}, {said}, as group {client.group}; Ctrl-C ends",
                    file=sys.stderr if asked.as_json else sys.stdout,
                    flush=True,
                )
                left = asked.count
                async for delivery in client.deliveries():
                    _print_message(delivery.message, as_json=asked.as_json)
                    await delivery.ack()
                    left = None if left is None else left - 1
                    if left == 0:
                        break
            nursery.cancel_scope.cancel()


async def _stop_when_asked(signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
    async for _number in signals:
        nursery.cancel_scope.cancel()


def _print_message(message: Received, *, as_json: bool) -> None:
    if not as_json:
        again = f" attempt {message.attempt}" if message.attempt > 1 else ""
        properties = "".join(f" {name}={value}" for name, value in message.properties.items())
        head = f"{message.topic} {message.message_type} {message.id.hex()}{again}{printable(properties.encode())}"
        print(f"{head}: {printable(message.body)}", flush=True)
        return
    print_json(
        {
            "id": message.id.hex(),
            "topic": message.topic,
            "message_type": message.message_type,
            "group": message.group,
            "attempt": message.attempt,
            "created_at": message.created_at,
            "properties": dict(message.properties),
            "body": body_fields(message.body),
        }
    )
