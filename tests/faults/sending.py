"""Sends of the client library, noted in a history as what the program was told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from hashlib import sha256

from kiteq.errors import KiteQError, PartlySent, Refused
from kiteq.message import Message, Receipt
from kiteq_client import Client
from tests.faults.history import Event, PublishInvoked, PublishOk, PublishRefused, PublishUnknown

__all__ = ["digest", "send_noted"]


def digest(message: Message) -> str:
    """Return what a history keeps of a message that a client has sent or got."""
    values = (message.topic, message.message_type, sorted(message.properties.items()), message.body)
    return sha256(repr(values).encode()).hexdigest()[:16]


async def send_noted(
    client: Client, group: str, messages: list[Message], calls: Iterator[str], note: Callable[[Event], None]
) -> list[tuple[Message, object]]:
    """Send messages at once; return those that got no receipt, each with the error. calls: gives each send its name."""
    names = [next(calls) for _ in messages]
    for call, message in zip(names, messages, strict=True):
        what = (message.id.hex(), message.topic, message.message_type, digest(message), message.deliver_limit)
        note(PublishInvoked(time.monotonic(), call, group, *what))
    try:
        results = list[object](await client.send_many(messages))
    except PartlySent as partly:
        results = partly.results
    except KiteQError as error:
        results = [error] * len(messages)
    failed: list[tuple[Message, object]] = []
    for call, message, result in zip(names, messages, results, strict=True):
        now = time.monotonic()
        if isinstance(result, Receipt):
            note(PublishOk(now, call, result.groups, result.duplicate, result.durable, result.broker))
            continue
        failed.append((message, result))
        refused = isinstance(result, Refused)
        note(PublishRefused(now, call, str(result)) if refused else PublishUnknown(now, call))
    return failed
