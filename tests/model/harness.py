"""A whole broker without sockets, threads or real time: a test says what arrives, what is durable, and what time it is.

Each call runs the broker's loop until nothing more can happen, and returns. What was submitted to the store
waits until `commit`; only what a client or a timer waits for makes the harness commit by itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import trio
import trio.testing

from kiteq import broker
from kiteq.binding.bindings import Binding, to_wire
from kiteq.checking import tidy
from kiteq.config import Settings
from kiteq.delaying import _move_page
from kiteq.errors import StoreError, StoreFull
from kiteq.pipe.core import Core
from kiteq.pipe.events import PacketsRead
from kiteq.pipe.peer import Peer
from kiteq.pipe.pipeline import Pipeline
from kiteq.remoting import packets
from kiteq.remoting.codec import Decoder
from kiteq.remoting.packets import Packet
from kiteq.remoting.session import Session
from kiteq.store import half_cache
from kiteq.store.store import Store
from kiteq.store.tables import Row, Table, Usage
from kiteq.store.writer import NewRecord, Submission
from tests.store.reopening import KeptTables

P = TypeVar("P")

START_MS = 1_700_000_000_000
FRAME_BYTES_MAX = 64 << 20
RESTART_SECONDS = 0.125
MESSAGE_TABLES = (Table.LOG, Table.UNROUTED, Table.DELAYED)


class VirtualClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_ms = 1_000

    def monotonic(self) -> float:
        return self.now_ms / 1000

    def epoch_ms(self) -> int:
        return START_MS + self.now_ms

    def advance(self, seconds: float) -> None:
        self.now_ms += int(seconds * 1000)


class FillableTables(KeptTables):
    """Rows that outlive the broker, in a store that can be full: of the share for messages, or quite."""

    full = False
    crammed = False

    def apply(self, rows: list[Row]) -> None:
        if self.crammed and any(table in MESSAGE_TABLES and value is not None for table, _, value in rows):
            raise StoreFull("no room is left for messages")
        super().apply(rows)

    def usage(self) -> Usage:
        usage = super().usage()
        return usage._replace(used=usage.limit) if self.full else usage


class Connection:
    """A client's connection: it stands in for the session, and keeps what the broker has sent."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.received: list[Packet] = []
        self._decoder = Decoder(FRAME_BYTES_MAX)
        self._request = 0

    def __repr__(self) -> str:
        return f"<{self.peer.name} of {self.peer.group}>"

    def next_request(self) -> int:
        self._request += 1
        return self._request

    def flush(self) -> None:
        """Take what the broker has queued for this client."""
        for frame in self.peer.outbox:
            self.received += self._decoder.feed(frame)
        self.peer.outbox.clear()
        self.peer.outbox_bytes = 0

    def take(self, kind: type[P]) -> list[P]:
        """Return what was received of a kind, once."""
        found: list[P] = [packet for packet in self.received if isinstance(packet, kind)]
        self.received = [packet for packet in self.received if not isinstance(packet, kind)]
        return found


class Harness:
    """A broker over tables in memory, and its clients.

    finished: called for each submission when it is durable (None) or was refused, before the broker hears of it.
    """

    def __init__(self, **settings: Any) -> None:
        self.clock = VirtualClock()
        self.tables = FillableTables()
        self.settings = Settings(db="memory://", **settings)
        self.finished: Callable[[Submission, StoreError | None], None] = lambda _submission, _error: None
        self.connections: list[Connection] = []
        self.queued: list[Submission] = []
        """What was submitted and is not committed, in order."""
        self._submitted: list[Submission] = []
        self.core: Core
        self._pipeline: Pipeline
        self._sessions: dict[Peer, Session]
        self._dying = False
        self._count = 0
        self.start()

    def start(self) -> None:
        """Start the broker over what is in the tables, as after a crash."""
        store = Store(self.tables)
        store.writer._completed = self._completed
        store.writer.submit = self._submit  # type: ignore[method-assign]
        self.queued.clear()
        self.connections.clear()
        self._dying = False
        self.core, self._sessions, self._pipeline = broker._assemble(self.settings, self.clock, store)
        self.run(lambda: self.core.delays.look_again(self.tables))

    @property
    def store(self) -> Store:
        return self.core.store

    # --- the loop and the writer ----------------------------------------------------------------

    def run(self, work: Callable[[], Awaitable[None] | None]) -> None:
        """Run something on the broker's loop, and all that follows from it."""

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                self.core.deliveries.nursery = nursery
                waits = work()
                if waits is not None:
                    nursery.start_soon(_wait, waits)
                self.core.turn.end()
                await self._settle(nursery)
            self.core.deliveries.nursery = None

        with inline_threads():
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    async def _settle(self, nursery: trio.Nursery) -> None:
        """Return when no task is left; commit when one waits for it."""
        await trio.testing.wait_all_tasks_blocked()
        while nursery.child_tasks:
            if self.queued:
                self._write(len(self.queued))
            else:
                await trio.sleep(0.1)
            await trio.testing.wait_all_tasks_blocked()

    def _submit(self, submission: Submission) -> None:
        self.queued.append(submission)
        self._submitted.append(submission)

    def _write(self, count: int) -> None:
        batch = self.queued[:count]
        del self.queued[:count]
        if batch:
            self.store.writer._room_bytes = 0  # so that it looks how full the tables are
            self.store.writer._write(batch)

    def _completed(
        self, commit: int, submissions: list[Submission], new_records: list[NewRecord], error: StoreError | None
    ) -> None:
        for one in submissions:
            self.finished(one, error)
        if not self._dying:
            self.store._finish(commit, submissions, new_records, error)

    def commit(self, count: int | None = None) -> None:
        """Make one commit of the first submissions that wait; of all, until none is left, for None."""
        if count is not None:
            self.run(lambda: self._write(count))
            return
        while self.queued:
            self.run(lambda: self._write(len(self.queued)))

    def crash(self, durable: int) -> None:
        """Kill the broker after so many submissions became durable, before anybody heard of it; start it again."""
        self._dying = True
        self.run(lambda: self._write(durable))
        self.clock.advance(RESTART_SECONDS)
        self.start()

    # --- clients --------------------------------------------------------------------------------

    def connect(
        self, group: str, *, instance: bytes, topics: Sequence[str] = (), bindings: Sequence[Binding] = (),
        window: int = 0,
    ) -> Connection:  # fmt: skip
        """Return a greeted client; all that was submitted is durable then."""
        self._count += 1
        peer = Peer(f"c{self._count}:1", local=True, now=self.clock.monotonic(), touched=self.core.turn.touch_peer)
        connection = Connection(peer)
        self._sessions[peer] = cast("Session", connection)
        self.core.peers.add(peer)
        self.connections.append(connection)
        wire = [to_wire(binding) for binding in bindings]
        versions = [packets.WIRE_VERSION]
        self.send(
            connection,
            packets.Hello(
                connection.next_request(), packets.PROTOCOL, versions, instance, group, list(topics), wire, 0, 1
            ),
        )
        self.commit()
        assert peer.accepted, connection.received
        if window:
            self.send(connection, packets.Credit(0, window))
        connection.take(packets.Welcome)
        return connection

    def send(self, connection: Connection, *sent: Packet) -> list[Submission]:
        """Let one socket read bring packets; return what that submitted to the store."""
        self._submitted.clear()
        self.run(lambda: self._pipeline.run(PacketsRead(connection.peer, list(sent))))
        return self._submitted.copy()

    def leave(self, connection: Connection, *, goodbye: bool) -> None:
        """End a connection."""
        if goodbye:
            self.send(connection, packets.Goodbye(0, "done"))
            connection.peer.close("the client has left")
        else:
            connection.peer.close("the connection broke: by the test")

        def forget() -> None:
            self.core.peers.discard(connection.peer)
            broker._forget(self.core, connection.peer)
            self._sessions.pop(connection.peer, None)

        self.run(forget)
        self.connections.remove(connection)

    def ask(self, connection: Connection, verb: str, **arguments: Any) -> Any:
        """Return the answer to an administrative request, or the code of its refusal."""
        request = connection.next_request()
        self.send(connection, packets.Admin(request, verb, arguments))
        self.commit()
        answers: list[Any] = [answer.result for answer in connection.take(packets.AdminReply)]
        [answer] = answers + [refusal.code for refusal in connection.take(packets.Refusal)]
        return answer

    # --- what happens because time has passed ---------------------------------------------------

    def tick(self) -> None:
        """Ask what is due, and move delayed messages that are due."""
        self.run(self.core.checks.ask_due)
        while (due_ms := self.core.delays.next_ms) is not None and due_ms <= self.clock.epoch_ms():
            self.run(self._move)

    async def _move(self) -> None:
        async with self.core.delays.lock:
            assert await _move_page(self.core) is None

    def tidy(self) -> None:
        """Rewrite and trim rows of transactions, as it happens twice a minute."""
        self.run(lambda: tidy(self.core))


async def _wait(waits: Awaitable[None]) -> None:
    await waits


def limit_cache(bytes_max: int) -> None:
    """Keep only so many bytes of half messages in memory; the rest is read from the tables."""
    vars(half_cache)["HALF_CACHE_BYTES_MAX"] = bytes_max


@contextmanager
def inline_threads() -> Iterator[None]:
    """Let what is meant for a thread run on the loop."""

    async def run_sync(call: Callable[..., Any], *arguments: Any, **_options: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return call(*arguments)

    before = trio.to_thread.run_sync
    trio.to_thread.run_sync = run_sync  # type: ignore[assignment]
    try:
        yield
    finally:
        trio.to_thread.run_sync = before
