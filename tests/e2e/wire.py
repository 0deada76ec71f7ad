"""A raw client of the wire protocol, and a broker in this process for it to talk to.

Nothing is acked, extended or granted by itself: each test says what a consumer does.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import trio

from kiteq.binding.bindings import Binding, to_wire
from kiteq.broker import Broker, serve
from kiteq.clock import SystemClock
from kiteq.config import Settings
from kiteq.message import Message, decode
from kiteq.remoting import packets
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import NACK_FAILED, NACK_REJECTED, Packet
from tests.support.broker import DISK_FREE_MIN

P = TypeVar("P")

PATIENCE_SECONDS = 10.0
"""For what must come; generous, because test processes share few cores."""
TICK_SECONDS = 0.24
"""Two turns of the broker's timer, for what must not come."""


_streams: list[trio.SocketStream] = []
"""Connections of the running broker, closed with it."""


class JumpingClock(SystemClock):
    """The broker's clock, which a test can put forward."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = 0.0

    def advance(self, seconds: float) -> None:
        self.ahead_s += seconds

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s

    def epoch_ms(self) -> int:
        return super().epoch_ms() + int(self.ahead_s * 1000)


class Delivery(NamedTuple):
    tag: int
    attempt: int
    blob: bytes

    @property
    def body(self) -> bytes:
        return decode(self.blob, "", 1).body

    @property
    def number(self) -> int:
        return int(self.body[:10])


class Refused(AssertionError):
    """The broker refused where the test expected an answer."""

    def __init__(self, refusal: packets.Refusal) -> None:
        super().__init__(refusal)
        self.code = refusal.code
        self.reason = refusal.reason
        self.temporary = refusal.temporary


@asynccontextmanager
async def running(folder: Path | str, clock: SystemClock | None = None, **settings: Any) -> AsyncIterator[Broker]:
    """Run a broker on a store; leaving ends it without a goodbye."""
    db = folder if isinstance(folder, str) else f"lmdb://{folder}"
    opened = len(_streams)
    async with trio.open_nursery() as nursery:
        made = Settings(bind="127.0.0.1:0", db=db, **{"disk_free_min": DISK_FREE_MIN} | settings)
        run = partial(serve, made, clock=clock)
        broker: Broker = await nursery.start(run)
        try:
            yield broker
        finally:
            nursery.cancel_scope.cancel()
            for stream in _streams[opened:]:
                stream.socket.close()
            del _streams[opened:]


def numbered(count: int, topic: str = "t", message_type: str = "a", *, start: int = 0, **more: Any) -> list[Message]:
    """Return messages whose bodies are their numbers."""
    return [Message(topic, message_type, b"%010d" % number, **more) for number in range(start, start + count)]


class RawClient:
    """One connection. Packets that a test does not wait for yet are kept in `received`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.decoder = Decoder(64 << 20)
        self.received: list[Packet] = []
        self.deliveries: list[Delivery] = []
        self._request = 0

    def next_request(self) -> int:
        self._request += 1
        return self._request

    async def send(self, *sent: Packet) -> None:
        await self.stream.send_all(b"".join(map(encode_packet, sent)))

    async def read(self) -> bool:
        """Take what one read brings; return False when the broker has closed the connection."""
        try:
            chunk = await self.stream.receive_some(262_144)
        except trio.BrokenResourceError:
            return False
        for packet in self.decoder.feed(chunk):
            if isinstance(packet, packets.Deliver):
                for at, blob in enumerate(packet.messages):
                    attempt = packet.attempts if isinstance(packet.attempts, int) else packet.attempts[at]
                    self.deliveries.append(Delivery(packet.first_tag + at, attempt, blob))
            else:
                self.received.append(packet)
        return bool(chunk)

    async def wait(self, kind: type[P], request: int | None = None) -> P:
        """Return the next packet of a kind; fail at a refusal of the same request, or of the connection."""
        with trio.fail_after(PATIENCE_SECONDS):
            while True:
                for at, packet in enumerate(self.received):
                    if isinstance(packet, kind) and request in (None, packet.request):
                        del self.received[at]
                        return packet
                    if isinstance(packet, packets.Refusal) and packet.request in (request, 0):
                        del self.received[at]
                        raise Refused(packet)
                assert await self.read(), f"the connection ended while a {kind.__name__} was awaited"

    async def closed(self) -> packets.Refusal | None:
        """Wait until the broker closes the connection; return the reason it gave."""
        with trio.fail_after(PATIENCE_SECONDS):
            while await self.read():
                pass
        refusals = [packet for packet in self.received if isinstance(packet, packets.Refusal)]
        return refusals[-1] if refusals else None

    async def ask(self, kind: Callable[..., Any], answer: type[P], *values: Any) -> P:
        request = self.next_request()
        await self.send(kind(request, *values))
        return await self.wait(answer, request)

    async def hello(
        self, group: str, bindings: Sequence[Binding] = (), *, topics: Sequence[str] = (), warm_up: int = 0,
        concurrency: int = 1, instance: bytes | None = None,
    ) -> packets.Welcome:  # fmt: skip
        wire = [to_wire(binding) for binding in bindings]
        return await self.ask(
            packets.Hello, packets.Welcome, packets.PROTOCOL, [packets.WIRE_VERSION], instance or os.urandom(16), group,
            list(topics), wire, warm_up, concurrency,
        )  # fmt: skip

    async def credit(self, window: int) -> None:
        await self.send(packets.Credit(0, window))

    async def publish(self, messages: Sequence[Message | bytes]) -> packets.Receipts:
        blobs = [one if isinstance(one, bytes) else one.encoded() for one in messages]
        return await self.ask(packets.Publish, packets.Receipts, blobs)

    async def prepare(
        self, messages: Sequence[Message | bytes], sizes: int | list[int] = 1, check_after_ms: int = 0
    ) -> packets.Prepared:
        blobs = [one if isinstance(one, bytes) else one.encoded() for one in messages]
        return await self.ask(packets.Prepare, packets.Prepared, blobs, sizes, check_after_ms)

    async def enlist(self, transaction_id: bytes, messages: Sequence[Message]) -> packets.Prepared:
        blobs = [one.encoded() for one in messages]
        return await self.ask(packets.Enlist, packets.Prepared, transaction_id, blobs)

    async def decide(self, decision: int, ids: Sequence[bytes]) -> list[list[Any]]:
        """Decide and return what was not decided as asked."""
        return (await self.ask(packets.Decide, packets.Decided, decision, list(ids))).exceptions

    async def commit(self, *ids: bytes) -> list[list[Any]]:
        return await self.decide(packets.DECISION_COMMIT, ids)

    async def roll_back(self, *ids: bytes) -> list[list[Any]]:
        return await self.decide(packets.DECISION_ROLLBACK, ids)

    async def asked_nothing(self, seconds: float = TICK_SECONDS) -> None:
        """Fail when a check comes within a time."""
        with trio.move_on_after(seconds):
            while await self.read():
                pass
        assert not [one for one in self.received if isinstance(one, packets.Ask)]

    async def take(self, count: int) -> list[Delivery]:
        """Wait for so many deliveries and return them."""
        with trio.fail_after(PATIENCE_SECONDS):
            while len(self.deliveries) < count:
                assert await self.read(), "the connection ended while deliveries were awaited"
        taken, self.deliveries = self.deliveries[:count], self.deliveries[count:]
        return taken

    async def take_nothing(self, seconds: float = TICK_SECONDS) -> None:
        """Fail when a delivery comes within a time."""
        with trio.move_on_after(seconds):
            while not self.deliveries and await self.read():
                pass
        assert not self.deliveries, f"unexpected: {self.deliveries}"

    async def ack(self, deliveries: Sequence[Delivery]) -> list[int]:
        """Ack and return the stale tags once that is durable."""
        ranges: list[int] = []
        for tag in sorted(one.tag for one in deliveries):
            if ranges and ranges[-1] == tag - 1:
                ranges[-1] = tag
            else:
                ranges += [tag, tag]
        return (await self.ask(packets.Ack, packets.Settled, ranges)).stale

    async def nack(
        self, deliveries: Sequence[Delivery], error: str = "broken", *, how: int = NACK_FAILED,
        after_ms: int | None = None,
    ) -> list[int]:  # fmt: skip
        items = [[one.tag, how, after_ms, error] for one in deliveries]
        return (await self.ask(packets.Nack, packets.Settled, items)).stale

    async def reject(self, deliveries: Sequence[Delivery], error: str) -> list[int]:
        return await self.nack(deliveries, error, how=NACK_REJECTED)

    async def admin(self, verb: str, **arguments: Any) -> Any:
        return (await self.ask(packets.Admin, packets.AdminReply, verb, arguments)).result

    async def row(self, group: str, topic: str = "t") -> dict[str, Any]:
        """Return the row of a group and topic in `group.list`."""
        rows: list[dict[str, Any]] = await self.admin("group.list")
        return next(row for row in rows if (row["group"], row["topic"]) == (group, topic))

    async def wait_row(self, group: str, topic: str = "t", **expected: int) -> dict[str, Any]:
        """Wait until the row of a group has these values."""
        row: dict[str, Any] = {}
        with trio.move_on_after(PATIENCE_SECONDS):
            while True:
                row = await self.row(group, topic)
                if expected.items() <= row.items():
                    return row
                await trio.sleep(0.02)
        raise AssertionError(f"{row} never had {expected}")

    async def goodbye(self) -> None:
        await self.send(packets.Goodbye(0, "done"))
        await self.stream.aclose()

    async def break_off(self) -> None:
        """Close without a goodbye."""
        await self.stream.aclose()


async def open_raw(broker: Broker) -> RawClient:
    """Return a connection that has said nothing yet."""
    host, _, port = broker.address.rpartition(":")
    stream = await trio.open_tcp_stream(host, int(port))
    _streams.append(stream)
    return RawClient(stream)


async def connect(
    broker: Broker, group: str, *bindings: Binding, window: int = 0, warm_up: int = 0, concurrency: int = 1,
    topics: Sequence[str] = (), instance: bytes | None = None,
) -> RawClient:  # fmt: skip
    """Return a greeted client of a group; with a window it gets messages."""
    client = await open_raw(broker)
    await client.hello(group, bindings, topics=topics, warm_up=warm_up, concurrency=concurrency, instance=instance)
    if window:
        await client.credit(window)
    return client
