"""Whether a binding takes a message type, in time linear in its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import re2

from kiteq.binding.bindings import Binding, Kind

__all__ = ["Matcher", "check_agreement"]

PROGRAM_BYTES_MAX: Final = 1 << 20
"""What RE2 may use for one compiled pattern."""


def _options() -> re2.Options:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = PROGRAM_BYTES_MAX
    return options


class Matcher:
    """A binding, compiled. Raises `ValueError` with RE2's reason when its pattern is not valid."""

    __slots__ = ("matches",)

    matches: Callable[[str], bool]
    """Whether the binding takes this message type."""

    def __init__(self, binding: Binding) -> None:
        if binding.kind is Kind.DIRECT:
            self.matches = binding.pattern.__eq__
        elif binding.kind is Kind.FANOUT:
            self.matches = _always
        else:
            try:
                binding.pattern.encode()
                compiled = re2.compile(binding.pattern, _options())
            except UnicodeEncodeError:
                raise ValueError(f"the pattern {binding.pattern!r} is not valid text") from None
            except re2.error as error:
                reason = error.args[0].decode() if isinstance(error.args[0], bytes) else str(error)
                raise ValueError(f"the pattern {binding.pattern!r} is not valid RE2: {reason}") from None
            self.matches = lambda message_type: compiled.fullmatch(message_type) is not None


def _always(_message_type: str) -> bool:
    return True


def _shown(binding: Binding) -> str:
    """Return a text that is short also for a pattern of strange characters: a reason on the wire is limited."""
    text = str(binding)
    return text if len(text) <= 600 else text[:597] + "..."


def check_agreement(bindings: Sequence[Binding]) -> None:
    """Check that one group's bindings in one topic agree in what the group has there only once.

    Raises `ValueError` that names two bindings and the property.
    """
    for name in ("persistent", "watermark"):
        for binding in bindings[1:]:
            mine, other = getattr(binding, name), getattr(bindings[0], name)
            if mine != other:
                raise ValueError(
                    f"{_shown(bindings[0])} has {name}={other} but {_shown(binding)} has {name}={mine}; they must agree"
                )
