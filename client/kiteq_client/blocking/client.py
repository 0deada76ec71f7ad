"""The client without `async`, for programs of threads and forked processes.

Theory of operation. Each call runs the method of the same name of a `kiteq_client.Client` in the event
loop thread of the process. That client is made and entered at the first use in a process, by one task that
later leaves it. This module keeps no state but which `Live` is ours; `process` knows whether it still is.
"""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from kiteq.binding.bindings import Binding
from kiteq.errors import ClientClosed
from kiteq.limits import HANDLER_TIMEOUT_SECONDS, MAX_IN_FLIGHT_DEFAULT, PREFETCH_DEFAULT, SEND_TIMEOUT_SECONDS
from kiteq.message import Message, Receipt
from kiteq_client import client as asynchronous
from kiteq_client.blocking.delivery import Deliveries
from kiteq_client.blocking.handlers import Callbacks, Checker, CheckFunction, Handler, Handlers
from kiteq_client.blocking.portal import Portal, refuse_event_loop
from kiteq_client.blocking.process import Live, here
from kiteq_client.blocking.threads import Threads, is_handler_thread
from kiteq_client.blocking.transaction import Transaction
from kiteq_client.by_id import Prepared
from kiteq_client.statistics import Statistics

__all__ = ["Client"]

logger = logging.getLogger("kiteq_client")

T = TypeVar("T")

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Client:
    """A producer, a consumer, or both; usable from many threads and after a fork.

    It may be built when a module is imported. It connects at the first call, or when entered with `with`;
    a forked process connects anew at its first call, as another client instance.

    registry: "kiteq://host:port", more brokers after commas; or "zk://host:port/path" to find them in ZooKeeper.
    group: connections of one group act as one consumer, and as one producer.
    topics: what it will publish; a broker that does not serve one of them refuses at once.
    bindings: made durable when the client connects; see `direct`, `regex`, `fanout`.
    handlers, on_message: who handles messages, plain functions; `on_message` is one function for all.
    on_check: who knows what became of transactions; a plain function, or a `Checker`.
    prefetch: unacked messages per connection.
    concurrency: threads that handle messages; above 1 order is given up.
    handler_timeout: seconds until the message of a handler is nacked; the thread runs on, its result is ignored.
    max_in_flight: messages sent and not answered. timeout: seconds to wait for an answer.
    warm_up: seconds over which the broker raises the prefetch of a new connection.
    wait: whether connecting needs a broker; if so the first call raises `NotConnected` when there is none,
        and the next call tries again.
    secret: brokers of this version have no users and do not ask for it.

    Raises `ValueError` for a value out of range, `TypeError` for an `async def` handler.
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
        callbacks = Callbacks(handlers, on_message, on_check)
        callbacks.check()
        topics = topics if isinstance(topics, str) else list(topics)  # a str is refused below
        bindings = list(bindings)

        def make(threads: Threads | None) -> asynchronous.Client:
            return asynchronous.Client(
                registry,
                group=group,
                secret=secret if threads is not None else None,
                topics=topics,
                bindings=bindings,
                handlers=callbacks.handlers_in(threads) if threads is not None else None,
                on_check=callbacks.checker_in(threads) if threads is not None else None,
                prefetch=prefetch,
                concurrency=concurrency,
                handler_timeout=handler_timeout,
                max_in_flight=max_in_flight,
                timeout=timeout,
                warm_up=warm_up,
                wait=wait,
            )

        self.group = make(None).group  # raises for what is out of range, now and not at the first use
        self._make = make
        self._callbacks = callbacks
        self._concurrency = concurrency
        self._live: Live | None = None
        self._closed = False

    # --- opening and closing -------------------------------------------------------------------
    def __enter__(self) -> Self:
        """Connect. Raises what the first call would raise."""
        try:
            self._opened()
        except ClientClosed:
            raise
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish handlers, sends and acks, each within its time, then say goodbye; later calls raise `ClientClosed`.

        Calls of other threads that are under way are finished. Closing again does nothing.
        Raises `RuntimeError` in a handler, which would wait for itself.
        """
        refuse_event_loop()
        if is_handler_thread():
            raise RuntimeError("a handler must not close the client that waits for it")
        self._closed = True
        live = self._leave()
        if live is not None:
            live.wait_ended()

    def _leave(self) -> Live | None:
        """Let what is open in this process end; return it."""
        process = here()
        with process.lock:
            live = self._live
        if live is None or live.process is not process:
            return None
        live.leave()
        return live

    def _opened(self) -> tuple[Portal, asynchronous.Client]:
        """Return the portal and the client that is entered there; enter one if there is none."""
        refuse_event_loop()
        process = here()
        with process.lock:
            if self._closed:
                raise ClientClosed("the client was closed")
            live = self._live
            if live is None or live.process is not process or live.is_over:
                live = Live(process, self._make, self._concurrency)
                process.open(live)
                self._live = live
        return live.portal, live.opened.result()

    def __del__(self) -> None:
        live = getattr(self, "_live", None)
        if live is not None and live.process is here() and not live.is_over:
            text = f"a blocking client of group {self.group!r} was dropped without close()"
            warnings.warn(text, ResourceWarning, stacklevel=1, source=self)
            live.leave()

    def _call(self, method: Callable[[asynchronous.Client], Awaitable[T]]) -> T:
        """Run a method of the async client and return what it returns."""
        portal, client = self._opened()
        try:
            return portal.call(method, client)
        except ClientClosed as error:
            # The async client speaks of its `async with` block.
            raise ClientClosed("the client was closed before this call was done") from error

    # --- sending -------------------------------------------------------------------------------
    def send(self, message: Message) -> Receipt:
        """Send a message; it is durable, for every group bound to it, when this returns.

        Raises `Refused`, `SendTimeout` (outcome unknown, sending it again is safe), `NotConnected`,
        `MessageTooLarge`, or `ValueError` for a value out of range.
        """
        return self._call(lambda client: client.send(message))

    def send_many(self, messages: Iterable[Message]) -> list[Receipt]:
        """Send messages in order, many at a time; all are durable when this returns.

        Raises `PartlySent` with a receipt or an error for each if some were not accepted.
        """
        batch = list(messages)  # here: it may be a generator that waits for other things
        return self._call(lambda client: client.send_many(batch))

    # --- transactions --------------------------------------------------------------------------
    def transaction(self, *messages: Message, confirm: bool = False, check_after: float | None = None) -> Transaction:
        """Return a `with` block around a database transaction: leaving it commits the messages, all or none.

        They are durable when the block begins, and delivered to nobody before it is left. confirm: raise
        `DecisionPending` when the commit is not answered within `timeout`; otherwise that is a warning.
        check_after: seconds until the broker first asks about it; None is the broker's default.

        Raises `ValueError` for messages that cannot be in it. Entering raises what `send` raises, and then
        nothing has happened. Leaving raises `TransactionConflict` if it was rolled back meanwhile, and
        `UnknownTransaction`.
        """
        return Transaction(self._opened, messages, check_after, confirm=confirm)

    def prepare(self, *messages: Message, check_after: float | None = None) -> Prepared:
        """Make the messages of a transaction durable, for `commit` or `rollback` later; until then checks decide.

        Raises what entering a `transaction` raises.
        """
        return self._call(lambda client: client.prepare(*messages, check_after=check_after))

    def commit(self, transaction: Prepared | bytes | str) -> None:
        """Commit what `prepare` made, or what has this id (16 bytes or 32 hex digits); durable when it returns.

        Raises `TransactionConflict` if it was rolled back, `UnknownTransaction`, `DecisionPending` if there
        is no answer in time (the client goes on sending it), `NotConnected`.
        """
        self._call(lambda client: client.commit(transaction))

    def rollback(self, transaction: Prepared | bytes | str) -> None:
        """Roll back, else as `commit`."""
        self._call(lambda client: client.rollback(transaction))

    # --- consuming -----------------------------------------------------------------------------
    def run(self) -> None:
        """Let handlers and the check function work until SIGTERM, SIGINT, or another thread closes the client.

        Only in the main thread it hears signals. Returning does not close the client: leave its `with`
        block, or call `close`. Raises `RuntimeError` for a client without handlers and check function.
        """
        if not self._callbacks.handle and self._callbacks.checker is None:
            raise RuntimeError("run() needs handlers=, on_message= or on_check=")
        portal, client = self._opened()
        # Of the simple kind, as only that may be filled by a signal that interrupts its own reader.
        over: SimpleQueue[int | None] = SimpleQueue()
        with _signals_to(over):
            running = portal.submit(client.run)
            running.add_done_callback(lambda _: over.put(None))
            try:
                number = over.get()
            finally:
                running.cancel()
        if number is None:
            with suppress(ClientClosed):
                running.result()
        else:
            logger.info("%s: leaving", signal.Signals(number).name)

    def deliveries(self) -> Deliveries:
        """Return an iterator of deliveries, each to be answered; the broker sends while it is iterated.

            for delivery in client.deliveries():
                delivery.ack()

        Raises `RuntimeError` for a client with handlers, or while another iterator is open.
        """
        portal, client = self._opened()
        return portal.call_plain(lambda: Deliveries(client.deliveries(), portal))

    # --- bindings and administration -----------------------------------------------------------
    def subscribe(self, binding: Binding) -> None:
        """Add a binding, or change it; durable when this returns."""
        self._call(lambda client: client.subscribe(binding))

    def unsubscribe(self, binding: Binding) -> None:
        """Remove a binding of this client's group, durably; with its last one in a topic goes what waits there."""
        self._call(lambda client: client.unsubscribe(binding))

    def admin(self, verb: str, **arguments: Any) -> Any:
        """Ask the first connected broker an administrative question; `doc/protocol.md` lists the verbs."""
        return self._call(lambda client: client.admin(verb, **arguments))

    def statistics(self) -> Statistics:
        """Return what this client did so far in this process, and with whom it is connected."""
        portal, client = self._opened()
        return portal.call_plain(client.statistics)


@contextmanager
def _signals_to(queue: SimpleQueue[int | None]) -> Iterator[None]:
    """Put the signals that ask for the end into `queue`; elsewhere than in the main thread do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda number, _: queue.put(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for one that was not set by Python and cannot be set from here.
            if handler is not None:
                signal.signal(number, handler)
