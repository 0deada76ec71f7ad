"""A scripted broker that keeps transactions, for what a real one does only in bad moments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio

from kiteq.remoting.packets import (
    DECISION_COMMIT,
    DECISION_ROLLBACK,
    Ack,
    Ask,
    Decide,
    Decided,
    Enlist,
    Goodbye,
    Nack,
    Packet,
    Prepare,
    Prepared,
    Publish,
    Receipts,
    Refusal,
    Settled,
    Subscribe,
    Subscribed,
)
from kiteq_client import Client, Transaction
from tests.client.peer import Connection

P = TypeVar("P")

NO_HANDLE = 0


async def until(condition: Callable[[], object]) -> None:
    """Wait for what happens at the other end of a socket."""
    with anyio.fail_after(4):
        while not condition():  # noqa: ASYNC110 there is no event for it
            await anyio.sleep(0.002)


@contextmanager
def hurried(client: Client, seconds: float = 0.05) -> Iterator[None]:
    """Let calls of transactions inside the block wait for an answer only so long; for those that get none."""
    transactions = client._transactions
    usual, transactions.timeout = transactions.timeout, seconds
    for broker in client._brokers.all:
        broker.deciding._timeout = seconds
    try:
        yield
    finally:
        transactions.timeout = usual


async def transact(client: Client, tx: Transaction) -> None:
    """Enter and leave a transaction, waiting only briefly for the answer to the commit."""
    await tx.__aenter__()
    with hurried(client):
        await tx.__aexit__(None, None, None)


@contextmanager
def warnings() -> Iterator[list[str]]:
    """Collect what the client warns about."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kiteq_client").addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger("kiteq_client").removeHandler(handler)


def everything(_packet: Packet) -> bool:
    """Lose the answer to everything but the goodbye."""
    return True


class Ledger:
    """What a broker knows of transactions; it lives longer than its connections.

    lose: called with each packet; what it returns True for is done, but not answered.
    refuse: code of the temporary or final refusal of a packet, or None to do it.
    """

    def __init__(self, broker: str = "b1") -> None:
        self.broker = broker
        self.open: dict[bytes, list[bytes]] = {}
        self.handles: dict[bytes, int] = {}
        self.decided: dict[bytes, int] = {}
        self.seen: list[Packet] = []
        self.answers: list[tuple[bytes, int]] = []
        self.connections: list[Connection] = []
        self.lose: Callable[[Packet], bool] = lambda _packet: False
        self.refuse: Callable[[Packet], tuple[str, bool] | None] = lambda _packet: None

    @property
    def committed(self) -> set[bytes]:
        return {key for key, decision in self.decided.items() if decision == DECISION_COMMIT}

    @property
    def rolled_back(self) -> set[bytes]:
        return {key for key, decision in self.decided.items() if decision == DECISION_ROLLBACK}

    def packets(self, kind: type[P]) -> list[P]:
        return [packet for packet in self.seen if isinstance(packet, kind)]

    async def script(self, connection: Connection) -> None:
        await connection.accept(broker=self.broker)
        await self.serve(connection)

    async def serve(self, connection: Connection) -> None:
        self.connections.append(connection)
        try:
            while True:
                packet = await connection.receive()
                self.seen.append(packet)
                if isinstance(packet, Goodbye):
                    return
                answer = self.answer(packet)
                if answer is not None and not self.lose(packet):
                    await connection.send(answer)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return
        finally:
            self.connections.remove(connection)

    def answered(self, packet: Packet) -> Packet:
        """Return the answer to what has one."""
        answer = self.answer(packet)
        assert answer is not None
        return answer

    def answer(self, packet: Packet) -> Packet | None:
        refused = self.refuse(packet)
        if refused is not None:
            return Refusal(packet.request, refused[0], "the script says so", temporary=refused[1])
        if isinstance(packet, Publish):
            return Receipts(packet.request, 1, True, [])
        if isinstance(packet, Ack | Nack):
            return Settled(packet.request, [])
        if isinstance(packet, Prepare):
            return self._prepare(packet)
        if isinstance(packet, Enlist):
            key = packet.token[:16]
            if key not in self.open:
                return Prepared(packet.request, NO_HANDLE, [[0, "unknown_transaction", "not open", False]])
            known = self.open[key]
            known += [blob for blob in packet.messages if blob not in known]
            return Prepared(packet.request, self.handles[key], [])
        if isinstance(packet, Decide):
            return self._decide(packet)
        if isinstance(packet, Subscribe):
            return Subscribed(packet.request)
        return None

    def _prepare(self, packet: Prepare) -> Packet:
        blobs = list(packet.messages)
        sizes = packet.sizes
        if isinstance(sizes, int):
            sizes = [sizes] * (len(blobs) // sizes)
        assert sum(sizes) == len(blobs)
        handles = []
        exceptions: list[list[object]] = []
        for index, size in enumerate(sizes):
            part, blobs = blobs[:size], blobs[size:]
            key = part[0][:16]
            if key in self.decided:
                exceptions.append([index, "transaction_conflict", "decided before", False])
                handles.append(NO_HANDLE)
                continue
            self.open[key] = part
            handles.append(self.handles.setdefault(key, 100 + len(self.handles)))
        return Prepared(packet.request, handles, exceptions)

    def _decide(self, packet: Decide) -> Packet:
        exceptions: list[list[object]] = []
        for index, token in enumerate(packet.tokens):
            key = token[:16]
            assert token[16:] in (b"", self.handles.get(key, 0).to_bytes(8, "big"))
            if packet.decision not in (DECISION_COMMIT, DECISION_ROLLBACK):
                self.answers.append((key, packet.decision))
            elif self.decided.get(key, packet.decision) != packet.decision:
                exceptions.append([index, "transaction_conflict", "decided the other way", False])
            elif key in self.open or key in self.decided:
                self.open.pop(key, None)
                self.decided[key] = packet.decision
            else:
                exceptions.append([index, "unknown_transaction", "never heard of it", False])
        return Decided(packet.request, exceptions)

    async def ask(self, *keys: bytes, attempt: int = 1) -> None:
        """Ask whoever is connected about open transactions."""
        tokens = [key + self.handles[key].to_bytes(8, "big") for key in keys]
        await self.connections[-1].send(Ask(0, attempt, tokens, [self.open[key][0] for key in keys]))
