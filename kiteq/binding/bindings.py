"""A binding: one group's wish for the messages of a topic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from kiteq.limits import NAME_LENGTH_MAX, PATTERN_LENGTH_MAX
from kiteq.message import check_name

__all__ = ["STARTS", "Binding", "Kind", "direct", "fanout", "from_wire", "regex", "to_wire"]

STARTS: Final = ("latest", "first")
WATERMARK_MAX: Final = (1 << 32) - 1
ANY_TYPE: Final = "*"


class Kind(IntEnum):
    """How a binding chooses message types; the numbers are KiteQ's and travel on the wire."""

    DIRECT = 0
    REGEX = 1
    FANOUT = 2


@dataclass(frozen=True, slots=True)
class Binding:
    """One group's wish for the messages of a topic.

    pattern: the message type (direct), an RE2 pattern matched against the whole type (regex), "*" (fanout).
    watermark: messages a second delivered to the group in this topic, None for no limit.
    persistent: messages wait while nobody of the group is connected.
    start: "latest", or "first" to get what was kept because no group was bound to it.
    Raises `ValueError`.
    """

    topic: str
    kind: Kind
    pattern: str
    watermark: int | None = None
    persistent: bool = True
    start: str = "latest"

    def __post_init__(self) -> None:
        """Check the values."""
        check_name("topic", self.topic)
        if self.kind is Kind.DIRECT:
            check_name("message type", self.pattern)
        elif not isinstance(self.pattern, str):
            raise ValueError(f"a pattern must be a str, not {type(self.pattern).__name__}")
        elif self.kind is Kind.REGEX:
            if not 1 <= len(self.pattern) <= PATTERN_LENGTH_MAX:
                raise ValueError(
                    f"a regex pattern has 1 to {PATTERN_LENGTH_MAX} characters, this one {len(self.pattern)}"
                )
        elif self.pattern != ANY_TYPE:
            raise ValueError(f"the pattern of a fanout binding is {ANY_TYPE!r}, not {self.pattern[:NAME_LENGTH_MAX]!r}")
        rate = self.watermark
        if rate is not None and not (type(rate) is int and 1 <= rate <= WATERMARK_MAX):
            raise ValueError(f"a watermark is a whole number of messages a second, 1 or more, not {rate!r}")
        if type(self.persistent) is not bool:
            raise ValueError(f"persistent is True or False, not {self.persistent!r}")
        if self.start not in STARTS:
            raise ValueError(f"start is 'latest' or 'first', not {str(self.start)[:64]!r}")

    def __str__(self) -> str:
        """Return the binding as a person would say it."""
        return f"{self.kind.name.lower()}({self.topic!r}, {self.pattern!r})"


def direct(
    topic: str, message_type: str, *, watermark: int | None = None, persistent: bool = True, start: str = "latest"
) -> Binding:
    """Bind to one message type of a topic. Raises `ValueError`."""
    return Binding(topic, Kind.DIRECT, message_type, watermark, persistent, start)


def regex(
    topic: str, pattern: str, *, watermark: int | None = None, persistent: bool = True, start: str = "latest"
) -> Binding:
    """Bind to the message types that an RE2 pattern matches as a whole. Raises `ValueError`."""
    return Binding(topic, Kind.REGEX, pattern, watermark, persistent, start)


def fanout(topic: str, *, watermark: int | None = None, persistent: bool = True, start: str = "latest") -> Binding:
    """Bind to every message type of a topic. Raises `ValueError`."""
    return Binding(topic, Kind.FANOUT, ANY_TYPE, watermark, persistent, start)


def to_wire(binding: Binding) -> list[object]:
    """Return a binding as the list that packets and store rows carry."""
    return [
        binding.topic, int(binding.kind), binding.pattern, binding.watermark, binding.persistent, binding.start,
    ]  # fmt: skip


def from_wire(fields: Sequence[object]) -> Binding:
    """Return the binding of such a list. Raises `ValueError`."""
    if len(fields) < 6:
        raise ValueError("a binding is [topic, kind, pattern, watermark, persistent, start]")
    topic, kind, pattern, watermark, persistent, start = fields[:6]
    if not (isinstance(topic, str) and type(kind) is int and isinstance(pattern, str) and isinstance(start, str)):
        raise ValueError("a binding is [topic, kind, pattern, watermark, persistent, start]")
    if not (watermark is None or type(watermark) is int) or type(persistent) is not bool:
        raise ValueError("a binding's watermark is a number or nil, and persistent true or false")
    return Binding(topic, Kind(kind), pattern, watermark, persistent, start)
