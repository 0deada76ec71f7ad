"""Looks at the brokers again and again: those that are gone stay known, those that come are taken in."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from kiteq.cli.cluster import in_threads, state_of_error
from kiteq.cli.finding import open_source
from kiteq.cli.session import AdminSession
from kiteq.errors import KiteQError, NotConnected, Refused

__all__ = ["Sight", "Watch"]

ANSWER_SECONDS_MAX: Final = 2.0
"""A broker that hangs delays the page by this, and by this again while it is connected to."""
FORGET_SECONDS: Final = 600.0
"""A broker that is announced no longer and not reached is shown for this long."""


@dataclass(frozen=True, slots=True)
class Sight:
    """One broker at one moment. overview: what it tells, None when it tells nothing, and then why, since when.

    state: of a broker that tells nothing. lost_s: for how many seconds it has told nothing.
    """

    address: str
    overview: dict[str, Any] | None
    state: str = ""
    error: str = ""
    lost_s: float | None = None


class _Watched:
    """One address: its connection while there is one, and since when it tells nothing."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.session: AdminSession | None = None
        self.neighbours: tuple[str, ...] = ()
        self.broker_id = ""
        self.lost_at: float | None = None

    def look(self) -> Sight:
        """Ask the broker; a connection that broke since the last look is made anew at once."""
        again = self.session is not None
        try:
            try:
                overview = self._ask()
            except NotConnected as error:
                if not again or isinstance(error.__cause__, TimeoutError):
                    raise  # one that hangs is not waited for twice
                overview = self._ask()
        except KiteQError as error:
            now = time.monotonic()
            self.lost_at = now if self.lost_at is None else self.lost_at
            return Sight(self.address, None, state_of_error(error), str(error), now - self.lost_at)
        self.lost_at = None
        return Sight(self.address, overview)

    def _ask(self) -> dict[str, Any]:
        if self.session is None:
            session = AdminSession(self.address, connect_seconds=ANSWER_SECONDS_MAX, answer_seconds=ANSWER_SECONDS_MAX)
            session.open()
            self.session = session
        try:
            overview: dict[str, Any] = self.session.ask("overview")
        except Refused:
            raise
        except KiteQError:
            self.close()
            raise
        self.broker_id, self.neighbours = self.session.broker_id, tuple(self.session.neighbours)
        return overview

    def close(self) -> None:
        """End the connection, if there is one."""
        if self.session is not None:
            self.session.close()
            self.session = None


class Watch:
    """Use it as `with Watch("zk://127.0.0.1") as watch: watch.look()`."""

    def __init__(self, named: str) -> None:
        self._named = named
        self._watched: dict[str, _Watched] = {}
        self._life = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as life:
            self._source = life.enter_context(open_source(self._named))
            life.callback(self._close)
            self._life = life.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._life.close()

    def _close(self) -> None:
        for watched in self._watched.values():
            watched.close()

    def look(self) -> list[Sight]:
        """Ask every broker at the same time; return what is seen of each, once."""
        announced = self._source.brokers()
        known = self._take(announced)
        sights: dict[str, Sight] = {}
        while new := [one for one in known.values() if one.address not in sights]:
            sights |= {sight.address: sight for sight in in_threads(_Watched.look, new)}
            if any(announced.values()):
                break
            # The others of a set of workers are known from those that are reached, where no registry has them.
            known = self._take([*announced, *(address for one in known.values() for address in one.neighbours)])
        return list(_each_once(known, sights))

    def _take(self, addresses: Iterable[str]) -> dict[str, _Watched]:
        """Return what is watched, with these addresses in it, and without what nobody has named for long."""
        named = dict.fromkeys(addresses)
        now = time.monotonic()
        for address, watched in list(self._watched.items()):
            if address not in named and watched.lost_at is not None and now - watched.lost_at > FORGET_SECONDS:
                del self._watched[address]
        for address in named:
            if address not in self._watched:
                self._watched[address] = _Watched(address)
        return dict(self._watched)


def _each_once(watched: dict[str, _Watched], sights: dict[str, Sight]) -> Iterable[Sight]:
    """Return the sights, of a broker that has several addresses only one: the first that tells something."""
    chosen: dict[str, Sight] = {}
    for address, sight in sights.items():
        broker = watched[address].broker_id or address
        if broker not in chosen or (chosen[broker].overview is None and sight.overview is not None):
            chosen[broker] = sight
    return chosen.values()
