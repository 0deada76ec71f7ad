"""One broker, whichever address it has: what it has not answered, and the connection of the moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import anyio

from kiteq.binding.bindings import Binding
from kiteq.errors import KiteQError
from kiteq.remoting.packets import Ask, Subscribe, Unsubscribe
from kiteq_client.deciding import Deciding
from kiteq_client.greeting import Key
from kiteq_client.outgoing import Frame
from kiteq_client.preparing import Preparing
from kiteq_client.session import Session
from kiteq_client.shared import Shared
from kiteq_client.transactions import Transactions
from kiteq_client.unanswered import Unanswered

__all__ = ["Broker", "ask_all"]

REQUEST_MAX: Final = (1 << 32) - 1


class Broker:
    """Keeps what must be sent again to this broker and to no other.

    take: called for the next frame, with the largest body that the broker takes.
    name: as the broker calls itself; "" before it has. session: None while there is no connection.
    serves: its topics, None for all. brought: the bindings that this connection has brought.
    turn: when it took something last, as `Outgoing.next_turn` counts.
    refused_at: when it has refused last what it may take later, for instance because its disk is full.
    """

    def __init__(
        self, shared: Shared, transactions: Transactions, take: Callable[[Broker, int], Frame | None], timeout: float
    ) -> None:
        self.name = ""
        self.session: Session | None = None
        self.serves: frozenset[str] | None = None
        self.brought: dict[Key, Binding] = {}
        self.was_connected = False
        self.turn = 0
        self.refused_at = float("-inf")
        self.unanswered = Unanswered(shared.outgoing, timeout)
        self.preparing = Preparing(shared.outgoing, transactions.answered_late, transactions.placing.place)
        self.deciding = Deciding(self.wake, transactions.settled, timeout)
        self._transactions = transactions
        self._take = take
        self._request = 1

    def next_request(self) -> int:
        """Return a request number; 0 is never used, as it means the connection, and 1 is of the greeting."""
        self._request = self._request + 1 if self._request < REQUEST_MAX else 2
        return self._request

    @property
    def takes_messages(self) -> bool:
        """Whether new messages can go to this broker now."""
        return self.session is not None and self.session.takes_messages

    @property
    def is_writing(self) -> bool:
        """Whether its connection is busy with a piece, and takes more by itself afterwards."""
        return self.session is not None and self.session.is_writing

    @property
    def is_woken(self) -> bool:
        """Whether its connection is about to ask for messages."""
        return self.takes_messages and self.session is not None and self.session.is_woken

    @property
    def is_open(self) -> bool:
        """Whether something of ours is to be done with this broker and no other."""
        return (
            self.unanswered.is_open
            or self.preparing.has_open
            or bool(self.deciding.pending)
            or self._transactions.has_at(self)
        )

    @property
    def load(self) -> int:
        """How many messages wait for this broker's answer."""
        return self.preparing.load + self.unanswered.count

    def is_late(self, before: float) -> bool:
        """Whether it has not answered something that was sent before that time."""
        return self.unanswered.is_late(before) or self.preparing.is_late(before) or self.deciding.is_late(before)

    def serves_topic(self, topic: str) -> bool:
        """Whether it serves a topic."""
        return self.serves is None or topic in self.serves

    def take(self, body_bytes_max: int) -> Frame | None:
        """Return what to send next, if it is this broker's turn."""
        return self._take(self, body_bytes_max)

    def wake(self) -> None:
        """There may be something to send."""
        if self.session is not None:
            self.session.wake()

    def asked(self, packet: Ask) -> None:
        """Answer what the broker asks about transactions."""
        self._transactions.asked(self, packet)


async def ask_all(
    brokers: Iterable[Broker], make: Callable[[int], Subscribe | Unsubscribe]
) -> dict[Broker, KiteQError]:
    """Ask all of these that are connected at once; return what went wrong, by broker."""
    problems: dict[Broker, KiteQError] = {}

    async def ask(broker: Broker, session: Session) -> None:
        try:
            await session.ask(make)
        except KiteQError as error:
            problems[broker] = error

    async with anyio.create_task_group() as tasks:
        for broker in brokers:
            if broker.session is not None:
                tasks.start_soon(ask, broker, broker.session)
    return problems
