"""One transaction of a client that is begun or open, with its encoded messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from kiteq.errors import SendTimeout
from kiteq.limits import PUBLISH_MESSAGES_MAX
from kiteq.message import Message
from kiteq_client.outgoing import FRAME_BYTES
from kiteq_client.preparing import Preparation

if TYPE_CHECKING:
    from kiteq_client.broker import Broker

__all__ = ["Half", "not_begun", "repeated", "split"]

PART_BYTES: Final = 2 * FRAME_BYTES
"""A transaction larger than this is prepared in several packets; a single message may be larger."""


class Half:
    """One transaction that is begun, or open.

    blob: its first message, encoded. broker: where it is, and `name` the broker's name; `token` as that
    broker gave it. abandoned: beginning it failed, so it must not be committed.
    """

    __slots__ = ("abandoned", "blob", "broker", "id", "name", "token")

    def __init__(self, id: bytes, blob: bytes) -> None:
        self.id = id
        self.token = id
        self.blob = blob
        self.name = ""
        self.broker: Broker | None = None
        self.abandoned = False

    @property
    def place(self) -> Broker:
        """Where it is, once it was begun."""
        assert self.broker is not None
        return self.broker


def not_begun(preparation: Preparation, why: str) -> SendTimeout:
    """Return the error for messages that were sent and not answered."""
    if preparation.token:
        return SendTimeout(f"{why}: whether the message was added is unknown; add it again, or roll back")
    return SendTimeout(f"{why}: the transaction was not begun and is rolled back; try again with a new Message")


def repeated(preparation: Preparation, error: Exception) -> SendTimeout:
    """Return the error for messages refused when they were sent again: they may be stored since the first time."""
    return not_begun(preparation, f"{error}, when it was sent again")


def split(messages: Sequence[Message]) -> list[list[bytes]]:
    """Return the encoded messages in lists that are not too large for a packet."""
    parts: list[list[bytes]] = [[]]
    size = 0
    for message in messages:
        blob = message.encoded()
        size += len(blob)
        if parts[-1] and (size > PART_BYTES or len(parts[-1]) == PUBLISH_MESSAGES_MAX):
            parts.append([])
            size = len(blob)
        parts[-1].append(blob)
    return parts
