"""Which broker is given half messages, and who waits until it has answered.

Theory of operation. What begins a transaction goes to the broker with the least to answer that serves its
topics, and to another one when that is gone or stands still before it was sent them. What is added to a
transaction goes where that is. Nobody has a timer: the client's watchdog ends what is late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import anyio

from kiteq.errors import ClientClosed, Refused, SendTimeout
from kiteq_client.half import not_begun, repeated
from kiteq_client.outgoing import Outgoing
from kiteq_client.preparing import Preparation
from kiteq_client.spread import is_behind, least_loaded

if TYPE_CHECKING:
    from kiteq_client.broker import Broker
    from kiteq_client.brokers import Brokers

__all__ = ["Placing"]


class Placing:
    """Brings half messages to brokers.

    watched: called when somebody waits. `unplaced` wait for a broker that takes them.
    """

    def __init__(self, brokers: Brokers, outgoing: Outgoing, watched: Callable[[], None]) -> None:
        self.unplaced: deque[Preparation] = deque()
        self._brokers = brokers
        self._outgoing = outgoing
        self._watched = watched
        self._awaited: dict[Preparation, None] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._awaited)

    async def wait(self, preparation: Preparation) -> None:
        """Return when a broker has it on disk. Raises why it has not."""
        done = anyio.Event()
        preparation.finish = done.set
        if preparation.ended:
            done.set()
        self._awaited[preparation] = None
        self._watched()
        try:
            await done.wait()
        finally:
            del self._awaited[preparation]
            if not preparation.ended:
                self._withdraw(preparation)
        if (error := preparation.error) is not None:
            raise repeated(preparation, error) if preparation.resent and type(error) is Refused else error

    def _withdraw(self, preparation: Preparation) -> None:
        """Nobody waits for it any more: what was not taken will not be."""
        preparation.ended = True
        if not preparation.sent:
            self._outgoing.want_no_more()

    def place(self, preparation: Preparation) -> None:
        """Give it to the broker with the least to answer that serves its topics, or keep it until there is one."""
        broker = least_loaded(self._brokers.all, preparation.topics)
        if broker is not None:
            self.give(preparation, broker)
        elif (refused := self._brokers.refuse_together(preparation.topics)) is not None:
            preparation.give_up(refused)
        else:
            self.unplaced.append(preparation)

    def give(self, preparation: Preparation, broker: Broker) -> None:
        """Give it to this broker."""
        preparation.broker = broker
        broker.turn = self._outgoing.next_turn()
        broker.preparing.waiting.append(preparation)
        broker.wake()

    def place_waiting(self) -> None:
        """Place what waits for a broker."""
        unplaced, self.unplaced = self.unplaced, deque()
        for preparation in unplaced:
            if not preparation.ended:
                self.place(preparation)

    def watch(self, now: float, waited: str, not_connected: Callable[[Iterable[str]], Exception | None]) -> None:
        """End what is late, and move on what waits for a broker that is gone.

        waited: how long that was, in words. not_connected: why no broker of these topics takes anything, if that is so.
        """
        for preparation in [one for one in self._awaited if one.deadline <= now]:
            behind = SendTimeout(f"{waited}: the brokers are behind, and nothing was sent")
            self._end(preparation, not_begun(preparation, waited), not_connected(preparation.topics) or behind)
        for broker in self._brokers.all:
            if broker.session is None:
                broker.preparing.forget_given_up()
            if broker.preparing.waiting and is_behind(broker):
                self._move_from(broker)
        if self.unplaced:
            self.place_waiting()

    def _move_from(self, broker: Broker) -> None:
        """Let what a broker never got go to another; what is added to its transactions cannot."""
        waiting = list(broker.preparing.waiting)
        broker.preparing.waiting.clear()
        for preparation in waiting:
            if preparation.token and not preparation.ended:
                broker.preparing.waiting.append(preparation)
            elif not preparation.ended:
                self.place(preparation)
        self._outgoing.want_no_more()

    def end_all(self, error: Exception | None = None) -> None:
        """End every call: the client has failed with `error`, or was left."""
        for preparation in list(self._awaited):
            unsent = ClientClosed("the client was left before the half message was sent")
            self._end(preparation, error or not_begun(preparation, "the client was left"), error or unsent)

    def _end(self, preparation: Preparation, sent: Exception, unsent: Exception) -> None:
        was_sent = preparation.sent
        preparation.give_up(sent if was_sent else unsent)
        if not was_sent:
            self._outgoing.want_no_more()
