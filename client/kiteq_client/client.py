"""The client: what users enter, send with and consume with.

Theory of operation. `async with` is one nesting: a task group whose only child shields the tasks that
carry the connections, so that a cancelled program can still finish its handlers and say goodbye. Errors
of the body go around the task group and leave as themselves; errors of the tasks are kept and raised by
the next call.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

import anyio
from anyio.abc import TaskGroup, TaskStatus

from kiteq.binding.bindings import Binding, to_wire
from kiteq.errors import ClientClosed, NotConnected, PartlySent, Refused
from kiteq.limits import (
    HANDLER_TIMEOUT_SECONDS,
    MAX_IN_FLIGHT_DEFAULT,
    PREFETCH_DEFAULT,
    PREFETCH_MAX,
    SEND_TIMEOUT_SECONDS,
)
from kiteq.message import Message, Receipt, check_name
from kiteq.remoting.packets import PROTOCOL, WIRE_VERSION, Admin, Hello, Subscribe, Unsubscribe
from kiteq_client.broker import Broker
from kiteq_client.consumer import Consumer
from kiteq_client.delivery import Deliveries
from kiteq_client.handlers import Handler, Handlers, check_handler
from kiteq_client.producer import Producer
from kiteq_client.registry import parse_registry
from kiteq_client.session import Session, Shared
from kiteq_client.signal import Signal
from kiteq_client.statistics import Counters, Statistics
from kiteq_client.stopping import wait_signal_or

__all__ = ["Client"]

logger = logging.getLogger("kiteq_client")

OTHERS_SECONDS: Final = 0.5
"""Once one broker has accepted, how long entering waits to hear of the others."""
LEAVE_POLL_SECONDS: Final = 0.005
"""How often leaving looks whether all sends are answered; only then is anything polled."""
WATCH_SECONDS_MAX: Final = 0.25
"""How often the watchdog looks at timeouts, or a twentieth of the shortest one."""


class Client:
    """A producer, a consumer, or both; use it in `async with`.

    registry: "kiteq://host:port", more brokers after commas.
    group: connections of one group act as one consumer, and as one producer.
    topics: what it will publish; a broker that does not serve one of them refuses at once.
    bindings: made durable when the client enters; see `direct`, `regex`, `fanout`.
    handlers, on_message: who handles messages; `on_message` is one function for all.
    prefetch: unacked messages per connection. concurrency: handlers at a time; above 1 order is given up.
    handler_timeout: seconds until a handler is cancelled and its message nacked.
    max_in_flight: messages sent and not answered. timeout: seconds to wait for an answer.
    warm_up: seconds over which the broker raises the prefetch of a new connection.
    wait: whether entering needs a broker.
    secret: brokers of this version have no users and do not ask for it.
    """

    def __init__(
        self,
        registry: str,
        *,
        group: str,
        secret: str | None = None,
        topics: Iterable[str] = (),
        bindings: Iterable[Binding] = (),
        handlers: Handlers | None = None,
        on_message: Handler | None = None,
        prefetch: int = PREFETCH_DEFAULT,
        concurrency: int = 1,
        handler_timeout: float = HANDLER_TIMEOUT_SECONDS,
        max_in_flight: int = MAX_IN_FLIGHT_DEFAULT,
        timeout: float = SEND_TIMEOUT_SECONDS,
        warm_up: int = 0,
        wait: bool = True,
    ) -> None:
        _check_numbers(prefetch, concurrency, max_in_flight, handler_timeout, timeout, warm_up)
        if handlers is not None and on_message is not None:
            raise ValueError("give handlers or on_message, not both")
        if on_message is not None:
            check_handler(on_message)
        if isinstance(topics, str):
            raise ValueError("topics must be a list of topics, not a str")  # noqa: TRY004 one kind of error
        self.group = check_name("group", group)
        self._topics = [check_name("topic", topic) for topic in topics]
        self._bindings = list(bindings)
        self._timeout = timeout
        self._handler_timeout = handler_timeout
        self._warm_up = warm_up
        self._concurrency = concurrency
        self._wait = wait
        self._instance = os.urandom(16)
        self._counters = Counters()
        self._watched = Signal()
        self._producer = Producer(max_in_flight, timeout, ready=self._wake_writers, watched=self._watched.set)
        self._consumer = Consumer(
            group,
            handlers.find if handlers is not None else None if on_message is None else lambda *_: on_message,
            prefetch=prefetch,
            concurrency=concurrency,
            handler_timeout=handler_timeout,
            sessions=self._sessions,
            busy=self._watched.set,
        )
        shared = Shared(
            self._producer.outgoing,
            self._consumer.incoming,
            prefetch,
            timeout,
            self._consumer.held_tags,
            self._counters,
        )
        self._brokers = [
            Broker(address, shared, self._hello, connected=self._connected, failed=self._progressed)
            for address in parse_registry(registry)
        ]
        self._progress = Signal()
        self._state = "new"
        self._task_id: int | None = None
        self._failure: Exception | None = None
        self._lifetime: AbstractAsyncContextManager[None] | None = None
        if secret is not None:
            logger.warning("brokers of this version have no users: the secret is not used")

    # --- entering and leaving ------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise RuntimeError("a Client is entered once; make a new one")
        self._state = "open"
        self._task_id = anyio.get_current_task().id
        self._stopped = anyio.Event()
        self._lifetime = self._live_through()
        await self._lifetime.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if anyio.get_current_task().id != self._task_id:
            raise RuntimeError("a Client must be left by the task that entered it")
        assert self._lifetime is not None
        await self._lifetime.__aexit__(kind, error, traceback)

    @asynccontextmanager
    async def _live_through(self) -> AsyncIterator[None]:
        problem: BaseException | None = None
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as outer:
                tasks: TaskGroup = await outer.start(self._run_tasks)
                try:
                    await self._wait_connected()
                    yield
                except BaseException as error:  # noqa: BLE001 raised again below, outside of the task group
                    problem = error
                # The goodbye is not cut short by whatever ended the body.
                scope.shield = True
                try:
                    await self._leave()
                finally:
                    tasks.cancel_scope.cancel()
        if problem is not None:
            raise problem

    async def _run_tasks(self, *, task_status: TaskStatus[TaskGroup]) -> None:
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._guarded, self._watch)
                for broker in self._brokers:
                    tasks.start_soon(self._guarded, broker.run)
                tasks.start_soon(self._guarded, self._consumer.run_workers)
                task_status.started(tasks)

    async def _guarded(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run a task; if it fails, every later call raises its error."""
        try:
            await work(*arguments)
        except Exception as error:
            logger.exception("the client failed")
            self._failure = error
            self._producer.end_all(error)
            self._stopped.set()
            self._consumer.incoming.wake_all()
            self._progress.set()

    async def _wait_connected(self) -> None:
        """Return when a broker has accepted. Raises what the brokers answered otherwise."""
        if not self._wait:
            return
        with anyio.move_on_after(self._timeout):
            while not self._sessions() and self._failure is None and not all(map(_is_final, self._brokers)):
                await self._progress.wait()
        if self._failure is not None:
            raise self._failure
        if not self._sessions():
            raise self._not_connected()
        with anyio.move_on_after(OTHERS_SECONDS):
            for broker in self._brokers:
                await broker.tried.wait()

    async def _leave(self) -> None:
        """Finish handlers, sends and acks, each within its time; then say goodbye."""
        await self._consumer.finish()
        self._state = "closed"
        sessions = self._sessions()
        with anyio.move_on_after(self._timeout if sessions else 0):
            while self._producer.is_waiting:  # noqa: ASYNC110 only here, and no event per message for it
                await anyio.sleep(LEAVE_POLL_SECONDS)
        async with anyio.create_task_group() as tasks:
            for session in sessions:
                tasks.start_soon(self._leave_session, session)
        self._producer.end_all()
        self._stopped.set()
        self._consumer.incoming.wake_all()

    async def _leave_session(self, session: Session) -> None:
        with anyio.move_on_after(self._timeout):
            await session.wait_quiet()
        with anyio.move_on_after(1):
            await session.leave()

    # --- sending -------------------------------------------------------------------------------
    async def send(self, message: Message) -> Receipt:
        """Send a message; it is durable, for every group bound to it, when this returns.

        Raises `Refused`, `SendTimeout` (outcome unknown, sending it again is safe), `NotConnected`,
        `MessageTooLarge`, or `ValueError` for a value out of range.
        """
        self._check()
        message.encoded()
        [result] = await self._producer.submit([message])
        if isinstance(result, Receipt):
            return result
        raise result

    async def send_many(self, messages: Iterable[Message]) -> list[Receipt]:
        """Send messages in order, many at a time; all are durable when this returns.

        Raises `PartlySent` with a receipt or an error for each if some were not accepted.
        """
        self._check()
        batch = list(messages)
        if not batch:
            return []
        results = await self._producer.submit(batch)
        if any(isinstance(result, Exception) for result in results):
            raise PartlySent(results)
        return results  # type: ignore[return-value]

    # --- consuming -----------------------------------------------------------------------------
    async def run(self) -> None:
        """Let the handlers consume until cancelled, SIGTERM or SIGINT."""
        self._check()
        if not self._consumer.has_handlers:
            raise RuntimeError("run() needs handlers= or on_message=")
        await wait_signal_or(self._stopped)
        if self._failure is not None:
            raise self._failure

    def deliveries(self) -> Deliveries:
        """Return an iterator of deliveries, each to be answered; the broker sends while it is iterated.

            async for delivery in client.deliveries():
                await delivery.ack()

        Raises `RuntimeError` for a client with handlers, or while another iterator is open.
        """
        self._check()
        return self._consumer.deliveries(self._check)

    # --- bindings and administration -----------------------------------------------------------
    async def subscribe(self, binding: Binding) -> None:
        """Add a binding, or change it; durable when this returns."""
        for session in self._connected_sessions():
            await session.ask(lambda request: Subscribe(request, [to_wire(binding)]))
        self._bindings = [known for known in self._bindings if not _same(known, binding)] + [binding]

    async def unsubscribe(self, binding: Binding) -> None:
        """Remove a binding of this client's group, durably; with its last one in a topic goes what waits there."""
        for session in self._connected_sessions():
            await session.ask(lambda request: Unsubscribe(request, binding.topic, int(binding.kind), binding.pattern))
        self._bindings = [known for known in self._bindings if not _same(known, binding)]

    async def admin(self, verb: str, **arguments: Any) -> Any:
        """Ask the first connected broker an administrative question; `doc/protocol.md` lists the verbs."""
        return await self._connected_sessions()[0].ask(lambda request: Admin(request, verb, arguments))

    def statistics(self) -> Statistics:
        """Return what this client did so far, and with whom it is connected."""
        counters = self._counters
        return Statistics(
            connected=tuple(str(broker.address) for broker in self._brokers if broker.session is not None),
            not_reached={str(broker.address): str(broker.error) for broker in self._brokers if broker.session is None},
            in_flight=self._producer.outgoing.in_flight,
            sent=counters.sent,
            received=self._consumer.incoming.received,
            acked=counters.acked,
            nacked=counters.nacked,
            stale=counters.stale,
            reconnects=sum(max(0, broker.connects - 1) for broker in self._brokers),
        )

    # --- what the parts ask --------------------------------------------------------------------
    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._state != "open":
            raise ClientClosed("use the client inside its `async with` block")

    def _sessions(self) -> list[Session]:
        return [broker.session for broker in self._brokers if broker.session is not None]

    def _connected_sessions(self) -> list[Session]:
        self._check()
        sessions = self._sessions()
        if not sessions:
            raise self._not_connected()
        return sessions

    def _not_connected(self) -> Exception:
        for broker in self._brokers:
            if isinstance(broker.error, Refused):
                return broker.error
        return NotConnected("; ".join(str(broker.error) for broker in self._brokers))

    def _hello(self, request: int) -> Hello:
        bindings = [to_wire(binding) for binding in self._bindings]
        return Hello(
            request, PROTOCOL, [WIRE_VERSION], self._instance, self.group, self._topics, bindings,
            self._warm_up, self._concurrency,
        )  # fmt: skip

    def _connected(self, session: Session) -> None:
        self._consumer.connected(session)
        self._progress.set()

    def _progressed(self) -> None:
        self._progress.set()

    def _wake_writers(self) -> None:
        # The first one woken takes most of what waits, so they take turns.
        self._brokers.append(self._brokers.pop(0))
        for session in self._sessions():
            session.wake()

    async def _watch(self) -> None:
        """The watchdog of all timeouts: a cancel scope for each call and message would cost far more."""
        period_s = min(WATCH_SECONDS_MAX, self._timeout / 20, self._handler_timeout / 20)
        while True:
            if not self._producer.is_waiting and not self._consumer.is_handling:
                await self._watched.wait()
            await anyio.sleep(period_s)
            now = monotonic()
            self._consumer.expire_handlers(now)
            if self._producer.end_late(now, lambda: None if self._sessions() else self._not_connected()):
                for broker in self._brokers:
                    if broker.session is None:
                        broker.unanswered.forget_given_up()


def _is_final(broker: Broker) -> bool:
    return broker.tried.is_set() and isinstance(broker.error, Refused) and not broker.error.temporary


def _same(one: Binding, other: Binding) -> bool:
    return (one.topic, one.kind, one.pattern) == (other.topic, other.kind, other.pattern)


def _check_numbers(
    prefetch: int, concurrency: int, max_in_flight: int, handler_timeout: float, timeout: float, warm_up: int
) -> None:
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
