"""Which values the arguments of a client may have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from kiteq.limits import PREFETCH_MAX
from kiteq.message import Message, Received, check_name
from kiteq_client.checking import Checker, CheckFunction, check_checker
from kiteq_client.handlers import Handler, Handlers, check_handler

__all__ = ["Find", "check_are_messages", "check_numbers", "check_topics", "choose_checker", "choose_find"]

_MESSAGE_TYPES: Final = {Message, Received}

Find = Callable[[str, str], Handler | None]


def check_numbers(
    prefetch: int, concurrency: int, max_in_flight: int, handler_timeout: float, timeout: float, warm_up: int
) -> None:
    """Raise `ValueError` for a number out of range."""
    for name, value, most in (
        ("prefetch", prefetch, PREFETCH_MAX),
        ("concurrency", concurrency, PREFETCH_MAX),
        ("max_in_flight", max_in_flight, 1_000_000),
    ):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, not {value}")
    for name, seconds in (("handler_timeout", handler_timeout), ("timeout", timeout)):
        if not seconds > 0:
            raise ValueError(f"{name} must be above 0 seconds, not {seconds}")
    if warm_up < 0:
        raise ValueError(f"warm_up must be at least 0 seconds, not {warm_up}")


def check_topics(topics: Iterable[str]) -> list[str]:
    """Return topics as a list. Raises `ValueError` for what is no list of topic names."""
    if isinstance(topics, str):
        raise ValueError("topics must be a list of topics, not a str")  # noqa: TRY004 one kind of error
    return [check_name("topic", topic) for topic in topics]


def check_are_messages(messages: Sequence[object]) -> None:
    """Raise `ValueError` if one is no `Message`: later it would end the connection that encodes it."""
    if not set(map(type, messages)) <= _MESSAGE_TYPES:
        for message in messages:
            if not isinstance(message, Message):
                raise ValueError(f"a message must be a Message, not {type(message).__name__}")  # noqa: TRY004 as above


def choose_find(handlers: Handlers | None, on_message: Handler | None) -> Find | None:
    """Return what finds the handler of a message; None for a client that handles none.

    Raises `ValueError` if both are given, `TypeError` for a function that is no handler.
    """
    if handlers is not None and on_message is not None:
        raise ValueError("give handlers or on_message, not both")
    if on_message is not None:
        check_handler(on_message)
        return lambda *_: on_message
    return handlers.find if handlers is not None and not handlers.only_checks else None


def choose_checker(
    handlers: Handlers | None, on_check: CheckFunction | Checker | None
) -> CheckFunction | Checker | None:
    """Return who answers checks. Raises `ValueError` if there are two, `TypeError` for what cannot."""
    registered = None if handlers is None else handlers.checker
    if on_check is None:
        return registered
    if registered is not None:
        raise ValueError("give on_check or a function under handlers.check, not both")
    check_checker(on_check)
    return on_check
