"""The one ordered list of handlers, and the loop that runs events through it.

An event goes to the next handler in the list that accepts its kind; what that handler returns goes
on from there, never back. So to learn what happens to a message, read HANDLERS.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from kiteq.errors import ConfigError
from kiteq.pipe.administer import Administer
from kiteq.pipe.admit import Admit
from kiteq.pipe.authenticate import Authenticate
from kiteq.pipe.bind import Bind
from kiteq.pipe.check import Check
from kiteq.pipe.check_halves import CheckHalves
from kiteq.pipe.deliver import Deliver
from kiteq.pipe.events import PacketsRead
from kiteq.pipe.heartbeat import Heartbeat
from kiteq.pipe.persist import Persist
from kiteq.pipe.respond import Respond
from kiteq.pipe.route import Route
from kiteq.pipe.settle import Settle
from kiteq.pipe.transact import Transact

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["HANDLERS", "Handler", "Pipeline", "describe", "load_handlers"]


class Handler(Protocol):
    """One step. `accepts` and `emits` are the classes of events it takes and returns."""

    accepts: tuple[type[Any], ...]
    emits: tuple[type[Any], ...]

    def handle(self, event: Any) -> Iterable[Any]:
        """Act on a fact; return the facts that follow from it."""


HANDLERS: Final[tuple[type[Any], ...]] = (
    Authenticate,
    Heartbeat,
    Admit,
    Check,
    CheckHalves,
    Transact,
    Route,
    Persist,
    Respond,
    Deliver,
    Settle,
    Bind,
    Administer,
)

ENTERING: Final[tuple[type[Any], ...]] = (PacketsRead,)
"""Events that come from outside: a socket read."""


class Pipeline:
    """Handlers in order. Raises `ConfigError` when the order cannot work.

    It cannot when a handler accepts what nothing before it emits, or emits what nothing after it accepts.
    """

    def __init__(self, handlers: Sequence[Handler]) -> None:
        self._handlers = tuple(handlers)
        _prove(self._handlers)
        self._next: dict[tuple[int, type[Any]], int] = {}
        for kind in {kind for handler in handlers for kind in handler.accepts}:
            for place in range(-1, len(self._handlers)):
                for later in range(place + 1, len(self._handlers)):
                    if kind in self._handlers[later].accepts:
                        self._next[place, kind] = later
                        break

    def run(self, event: object, *, after: type[Any] | None = None) -> None:
        """Run an event, and all that follows from it, through the handlers behind the first `after`."""
        place = -1
        if after is not None:
            place = next(index for index, handler in enumerate(self._handlers) if isinstance(handler, after))
        waiting: list[tuple[int, object]] = [(place, event)]
        while waiting:
            place, event = waiting.pop()
            at = self._next[place, type(event)]
            followers = self._handlers[at].handle(event)
            if followers:
                waiting.extend([(at, follower) for follower in reversed(list(followers))])


def _prove(handlers: tuple[Handler, ...]) -> None:
    emitted = set(ENTERING)
    for place, handler in enumerate(handlers):
        name = type(handler).__name__
        for kind in handler.accepts:
            if kind not in emitted:
                raise ConfigError(f"handler {name} accepts {kind.__name__}, which no handler before it emits")
        emitted |= set(handler.emits)
        accepted_later = {kind for later in handlers[place + 1 :] for kind in later.accepts}
        for kind in handler.emits:
            if kind not in accepted_later:
                raise ConfigError(f"handler {name} emits {kind.__name__}, which no handler after it accepts")


def load_handlers(core: Core, own: Sequence[str]) -> list[Handler]:
    """Return the handlers of a broker, with a user's own put in.

    own: "module:Class" each. Such a class is made with the `Core`, says with `before` the name of the
    handler it comes before (by default "route"), and is otherwise a handler like the others.
    Raises `ConfigError`.
    """
    handlers: list[Handler] = [make(core) for make in HANDLERS]
    for path in own:
        module, _, name = path.partition(":")
        try:
            make = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"the pipeline handler {path!r} cannot be loaded: {error}") from error
        before = getattr(make, "before", "route")
        places = [place for place, handler in enumerate(handlers) if type(handler).__name__.lower() == before]
        if not places:
            raise ConfigError(f"the pipeline handler {path!r} wants to be before {before!r}, which does not exist")
        handlers.insert(places[0], make(core))
    return handlers


def describe() -> str:
    """Return the pipeline as text: a line for each handler with what it accepts and emits."""
    lines = []
    for handler in HANDLERS:
        accepts = ", ".join(kind.__name__ for kind in handler.accepts)
        emits = ", ".join(kind.__name__ for kind in handler.emits) or "-"
        summary = (handler.__doc__ or "").strip().splitlines()[0]
        lines.append(f"{handler.__name__.lower():<13} {accepts} -> {emits}\n{'':<13} {summary}")
    return "\n".join(lines)
