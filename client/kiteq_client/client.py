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

from kiteq.binding.bindings import Binding
from kiteq.errors import ClientClosed, PartlySent
from kiteq.limits import HANDLER_TIMEOUT_SECONDS, MAX_IN_FLIGHT_DEFAULT, PREFETCH_DEFAULT, SEND_TIMEOUT_SECONDS
from kiteq.message import Message, Receipt, check_name
from kiteq.remoting.packets import Admin
from kiteq_client import by_id
from kiteq_client.announced import Announced
from kiteq_client.brokers import Brokers
from kiteq_client.checking import Checker, CheckFunction, Checking
from kiteq_client.consumer import Consumer
from kiteq_client.decision import Decision
from kiteq_client.delivery import Deliveries
from kiteq_client.greeting import Greeting
from kiteq_client.handlers import Handler, Handlers
from kiteq_client.members import Listed, Members
from kiteq_client.options import check_are_messages, check_numbers, check_topics, choose_checker, choose_find
from kiteq_client.producer import Producer
from kiteq_client.registry import is_zookeeper, parse_registry
from kiteq_client.session import Session
from kiteq_client.shared import Shared
from kiteq_client.signal import Signal
from kiteq_client.statistics import Counters, Statistics
from kiteq_client.stopping import wait_signal_or
from kiteq_client.transaction import Transaction, check_messages, to_milliseconds
from kiteq_client.transactions import Transactions

__all__ = ["Client"]

logger = logging.getLogger("kiteq_client")

LEAVE_POLL_SECONDS: Final = 0.005
"""How often leaving looks whether all sends are answered; only then is anything polled."""
WATCH_SECONDS_MAX: Final = 0.25
"""How often the watchdog looks at timeouts, or a twentieth of the shortest one."""


class Client:
    """A producer, a consumer, or both; use it in `async with`.

    registry: "kiteq://host:port", more brokers after commas; or "zk://host:port/path" to find them in ZooKeeper.
    group: connections of one group act as one consumer, and as one producer.
    topics: what it will publish; a broker that does not serve one of them refuses at once.
    bindings: made durable when the client enters; see `direct`, `regex`, `fanout`.
    handlers, on_message: who handles messages; `on_message` is one function for all.
    on_check: who knows what became of transactions; a function, or a `Checker`.
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
        on_check: CheckFunction | Checker | None = None,
        prefetch: int = PREFETCH_DEFAULT,
        concurrency: int = 1,
        handler_timeout: float = HANDLER_TIMEOUT_SECONDS,
        max_in_flight: int = MAX_IN_FLIGHT_DEFAULT,
        timeout: float = SEND_TIMEOUT_SECONDS,
        warm_up: int = 0,
        wait: bool = True,
    ) -> None:
        check_numbers(prefetch, concurrency, max_in_flight, handler_timeout, timeout, warm_up)
        self.group = check_name("group", group)
        self._timeout = timeout
        self._handler_timeout = handler_timeout
        self._wait = wait
        self._topics = check_topics(topics)
        self._counters = Counters()
        self._watched = Signal()
        greeting = Greeting(
            os.urandom(16), group, self._topics, list(bindings), warm_up=warm_up, concurrency=concurrency
        )
        members: Members = Announced(registry, timeout) if is_zookeeper(registry) else Listed(parse_registry(registry))
        self._brokers = Brokers(greeting, members)
        self._producer = Producer(
            max_in_flight, timeout, ready=self._brokers.wake_writers, watched=self._watched.set,
            topics=self._brokers.name_topics if members.has_topics else None,
        )  # fmt: skip
        self._consumer = Consumer(
            group,
            choose_find(handlers, on_message),
            prefetch=prefetch,
            concurrency=concurrency,
            handler_timeout=handler_timeout,
            sessions=self._brokers.sessions,
            busy=self._watched.set,
        )
        self._transactions = Transactions(
            self._brokers,
            Checking(group, choose_checker(handlers, on_check)),
            self._producer.outgoing,
            self._counters,
            timeout=timeout,
            handler_timeout=handler_timeout,
            topics=self._topics,
            watched=self._watched.set,
            check=self._check,
        )
        shared = Shared(
            self._producer.outgoing, self._consumer.incoming, prefetch, timeout, self._consumer.held_tags,
            self._counters,
        )  # fmt: skip
        self._brokers.equip(shared, self._transactions, self._connected)
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
        self._brokers.members.prepare()
        self._state = "open"
        self._task_id = anyio.get_current_task().id
        self._stopped = anyio.Event()
        if self._transactions.checking.has_check and not self._topics:
            logger.warning(
                "there is a check function, and topics= is empty: the broker asks only clients that name the topics "
                "they publish"
            )
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
                tasks.start_soon(self._guarded, self._brokers.run, self._guarded)
                tasks.start_soon(self._guarded, self._consumer.run_workers)
                tasks.start_soon(self._guarded, self._transactions.checking.run)
                task_status.started(tasks)

    async def _guarded(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run a task; if it fails, every later call raises its error."""
        try:
            await work(*arguments)
        except Exception as error:
            logger.exception("the client failed")
            self._failure = error
            self._producer.end_all(error)
            self._transactions.end_all(error)
            self._stopped.set()
            self._consumer.incoming.wake_all()
            self._brokers.progress.set()

    async def _wait_connected(self) -> None:
        """Return when a broker has accepted. Raises what the brokers answered otherwise."""
        if not self._wait:
            return
        await self._brokers.wait_connected(self._timeout, lambda: self._failure is not None)
        if self._failure is not None:
            raise self._failure
        self._brokers.connected_sessions()
        await self._brokers.wait_others()

    async def _leave(self) -> None:
        """Finish handlers, sends, decisions and acks, each within its time; then say goodbye."""
        await self._consumer.finish()
        self._state = "closed"
        transactions = self._transactions
        with anyio.move_on_after(self._timeout if self._brokers.sessions() or transactions.pending else 0):
            while self._producer.is_waiting or transactions.is_waiting:  # noqa: ASYNC110 only here: no event per message
                await anyio.sleep(LEAVE_POLL_SECONDS)
        self._brokers.leaving = True
        async with anyio.create_task_group() as tasks:
            for session in self._brokers.sessions():
                tasks.start_soon(self._leave_session, session)
        self._producer.end_all()
        transactions.end_all()
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
        check_are_messages((message,))
        message.encoded()
        [result] = await self._producer.submit([message])
        if isinstance(result, Receipt):
            return result
        raise result

    async def send_many(self, messages: Iterable[Message]) -> list[Receipt]:
        """Send messages in order, many at a time; all are durable when this returns.

        Raises `PartlySent` with a receipt or an error for each if some were not accepted, and `ValueError` before
        anything is sent if one is no `Message`.
        """
        self._check()
        batch = list(messages)
        if not batch:
            return []
        check_are_messages(batch)
        results = await self._producer.submit(batch)
        if any(isinstance(result, Exception) for result in results):
            raise PartlySent(results)
        return results  # type: ignore[return-value]

    # --- transactions --------------------------------------------------------------------------
    def transaction(self, *messages: Message, confirm: bool = False, check_after: float | None = None) -> Transaction:
        """Return an `async with` block around a database transaction: leaving it commits the messages, all or none.

        They are durable when the block begins, and delivered to nobody before it is left. confirm: raise
        `DecisionPending` when the commit is not answered within `timeout`; otherwise that is a warning.
        check_after: seconds until the broker first asks about it; None is the broker's default.

        Raises `ValueError` for messages that cannot be in it. Entering raises what `send` raises, and then
        nothing has happened. Leaving raises `TransactionConflict` if it was rolled back meanwhile, and
        `UnknownTransaction`.
        """
        check_messages(messages)
        return Transaction(self._transactions, messages, to_milliseconds(check_after), confirm=confirm)

    async def prepare(self, *messages: Message, check_after: float | None = None) -> by_id.Prepared:
        """Make the messages of a transaction durable, for `commit` or `rollback` later; until then checks decide.

        Raises what entering a `transaction` raises.
        """
        check_messages(messages)
        return await by_id.prepare(self._transactions, messages, to_milliseconds(check_after))

    async def commit(self, transaction: by_id.Prepared | bytes | str) -> None:
        """Commit what `prepare` made, or what has this id (16 bytes or 32 hex digits); durable when it returns.

        Raises `TransactionConflict` if it was rolled back, `UnknownTransaction`, `DecisionPending` if there
        is no answer in time (the client goes on sending it), `NotConnected`.
        """
        await by_id.decide(self._transactions, transaction, Decision.COMMIT)

    async def rollback(self, transaction: by_id.Prepared | bytes | str) -> None:
        """Roll back, else as `commit`."""
        await by_id.decide(self._transactions, transaction, Decision.ROLLBACK)

    # --- consuming -----------------------------------------------------------------------------
    async def run(self) -> None:
        """Let the handlers and the check function work until cancelled, SIGTERM or SIGINT."""
        self._check()
        if not self._consumer.has_handlers and not self._transactions.checking.has_check:
            raise RuntimeError("run() needs handlers=, on_message= or on_check=")
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
        self._check()
        await self._brokers.subscribe(binding)

    async def unsubscribe(self, binding: Binding) -> None:
        """Remove a binding of this client's group, durably; with its last one in a topic goes what waits there."""
        self._check()
        await self._brokers.unsubscribe(binding)

    async def admin(self, verb: str, **arguments: Any) -> Any:
        """Ask the first connected broker an administrative question; `doc/protocol.md` lists the verbs."""
        self._check()
        return await self._brokers.connected_sessions()[0].ask(lambda request: Admin(request, verb, arguments))

    def statistics(self) -> Statistics:
        """Return what this client did so far, and with whom it is connected."""
        counters, brokers = self._counters, self._brokers
        return Statistics(
            connected=tuple(str(one.address) for one in brokers.diallers.values() if one.session is not None),
            not_reached={address: str(error) for address, error in brokers.away().items()},
            registry=brokers.members.state(),
            in_flight=self._producer.outgoing.in_flight,
            sent=counters.sent,
            received=self._consumer.incoming.received,
            acked=counters.acked,
            nacked=counters.nacked,
            stale=counters.stale,
            reconnects=brokers.reconnects,
            committed=counters.committed,
            rolled_back=counters.rolled_back,
            conflicts=counters.conflicts,
            unknown_transactions=counters.unknown_transactions,
            pending_decisions=self._transactions.pending,
            checks=dict(counters.checks),
        )

    # --- what the parts ask --------------------------------------------------------------------
    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._state != "open":
            raise ClientClosed("use the client inside its `async with` block")

    def _connected(self, session: Session) -> None:
        self._consumer.connected(session)
        self._transactions.placing.place_waiting()

    async def _watch(self) -> None:
        """The watchdog of all timeouts: a cancel scope for each call and message would cost far more."""
        period_s = min(WATCH_SECONDS_MAX, self._timeout / 20, self._handler_timeout / 20)
        while True:
            if not (self._producer.is_waiting or self._consumer.is_handling or self._transactions.is_waiting):
                await self._watched.wait()
            await anyio.sleep(period_s)
            now = monotonic()
            self._consumer.expire_handlers(now)
            self._transactions.watch(now, self._brokers.unserved)
            if self._producer.end_late(now, self._brokers.unserved):
                for broker in self._brokers.all:
                    broker.unanswered.give_up(connected=broker.session is not None)
            # Who has answered for long or not decides who is next, and nothing tells of that.
            self._brokers.wake_writers()
