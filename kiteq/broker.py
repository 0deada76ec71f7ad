"""The broker's lifecycle: each part lives inside the one it needs."""

from __future__ import annotations

import errno
import gc
import ipaddress
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
import trio

from kiteq.checking import run_checks
from kiteq.clock import SystemClock
from kiteq.clustering import leave, opener, run_registration, stay_announced
from kiteq.delaying import run_delayed
from kiteq.limits import DUPLICATE_WINDOW_SECONDS, FRAME_OVERHEAD_BYTES
from kiteq.pipe.check import Check
from kiteq.pipe.core import Core
from kiteq.pipe.deliveries import Deliveries
from kiteq.pipe.duplicates import DuplicateWindow
from kiteq.pipe.events import Batch, Checked, NotStored, PacketsRead, Stored
from kiteq.pipe.peer import Peer
from kiteq.pipe.persist import Persist
from kiteq.pipe.pipeline import Pipeline, load_handlers
from kiteq.pipe.router import Router
from kiteq.pipe.turn import Turn
from kiteq.recovery import run_timers
from kiteq.remoting.session import BROKEN, CLOSED, Session
from kiteq.store.opening import open_store

if TYPE_CHECKING:
    from kiteq.clock import Clock
    from kiteq.config import Settings
    from kiteq.registry.registry import OpenRegistry
    from kiteq.remoting.packets import Packet
    from kiteq.store.store import Store

__all__ = ["Broker", "address_of", "listen", "serve"]

BACKLOG_CONNECTIONS = 512
ACCEPT_PAUSE_SECONDS = 0.1
"""After the process ran out of file descriptors."""
GOODBYE_SECONDS = 0.2
"""What clients get, at least, to react to a goodbye."""

log = structlog.get_logger()


@dataclass(slots=True)
class Broker:
    """A running broker. address: HOST:PORT it listens on."""

    address: str
    core: Core
    _sessions: dict[Peer, Session]
    _listening: trio.CancelScope
    _serving: trio.CancelScope

    async def drain(self) -> None:
        """Leave the registry, stop accepting, let clients finish what they hold, flush, and end `serve`."""
        core = self.core
        if core.draining:
            return
        core.draining = True
        await leave(core)
        self._listening.cancel()
        for peer in core.peers:
            peer.say_goodbye("the broker is shutting down")
        core.turn.end()
        with trio.move_on_after(core.settings.drain_timeout):
            await trio.sleep(GOODBYE_SECONDS)
            while any(peer.in_flight or peer.uncommitted_bytes for peer in core.peers):  # noqa: ASYNC110 many causes
                await trio.sleep(GOODBYE_SECONDS)
        await core.store.all_durable()
        core.turn.end()
        self._serving.cancel()


async def serve(
    settings: Settings,
    *,
    clock: Clock | None = None,
    open_registry: OpenRegistry | None = None,
    partitions: tuple[int, ...] = (),
    beside: Callable[[Core], Awaitable[None]] | None = None,
    task_status: trio.TaskStatus[Broker] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a broker until it is drained or cancelled.

    open_registry: of the registry to take part in; by default that of the settings. partitions: what it
    announces to own. beside: runs with it, as long as it runs, for instance the HTTP port.
    Reports a `Broker` once it listens. Raises `ConfigError`, `StoreUnusable`, `StoreFailed`,
    `CredentialsRefused`, or `OSError` when the address cannot be bound.
    """
    clock = clock or SystemClock()
    open_registry = open_registry or opener(settings)
    listener = listen(settings.bind)
    with listener:
        store = open_store(settings.db, bytes_max=settings.store_limit)
        async with store.running():
            core, sessions, pipeline = _assemble(settings, clock, store)
            gc.collect()
            gc.freeze()
            try:
                with trio.CancelScope() as serving:
                    async with trio.open_nursery() as nursery:
                        core.deliveries.nursery = nursery
                        nursery.start_soon(_fail_with_store, store)
                        nursery.start_soon(run_timers, core)
                        nursery.start_soon(run_checks, core)
                        nursery.start_soon(run_delayed, core)
                        if open_registry is not None:
                            await nursery.start(run_registration, core, open_registry)
                        listening = await nursery.start(partial(_accept, listener, core, sessions, pipeline))
                        address = address_of(listener)
                        log.info("serving", address=address, broker_id=store.broker_id, epoch=store.epoch)
                        if core.registry is not None:
                            nursery.start_soon(stay_announced, core, settings.advertise or address, partitions)
                        if beside is not None:
                            nursery.start_soon(beside, core)
                        broker = Broker(address, core, sessions, listening, serving)
                        nursery.start_soon(_drain_when_asked, broker)
                        task_status.started(broker)
            except BaseExceptionGroup as group:
                if store.failure is not None:
                    raise store.failure from group
                raise
            finally:
                core.deliveries.nursery = None
                core.turn.submit()  # before the snapshot that ends the store


async def _drain_when_asked(broker: Broker) -> None:
    await broker.core.stop_wanted.wait()
    log.info("draining: an administrator asked for it")
    await broker.drain()


def address_of(listener: socket.socket) -> str:
    """Return HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_WHY: Final = {
    errno.EADDRINUSE: "another process listens there",
    errno.EADDRNOTAVAIL: (
        "this machine has no such address; bind 0.0.0.0, and say with --advertise where other machines find it"
    ),
}


def listen(bind: str) -> socket.socket:
    """Return a listening socket of HOST:PORT. Raises `OSError` saying which address and why."""
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(BACKLOG_CONNECTIONS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {bind}: {_WHY.get(error.errno or 0, error.strerror)}") from error
    return listener


def _assemble(settings: Settings, clock: Clock, store: Store) -> tuple[Core, dict[Peer, Session], Pipeline]:
    """Put the parts together."""
    sessions: dict[Peer, Session] = {}

    def flush(peer: Peer) -> None:
        session = sessions.get(peer)
        if session is not None:
            session.flush()

    turn = Turn(store, flush)
    counters: Counter[str] = Counter()
    deliveries = Deliveries(store, clock, settings, turn, counters)
    router = Router(store, deliveries, settings.topics)
    duplicates = DuplicateWindow(clock.monotonic(), store.last_commit)
    recovered = store.take_recovered()
    duplicates.rebuild(recovered.recent, clock.epoch_ms() - int(DUPLICATE_WINDOW_SECONDS * 1000))
    deliveries.take_due(recovered.due)
    if recovered.damaged:
        log.error("records with a bad checksum were put into quarantine", records=recovered.damaged)
    core = Core(
        settings=settings,
        clock=clock,
        store=store,
        router=router,
        deliveries=deliveries,
        duplicates=duplicates,
        turn=turn,
        counters=counters,
        started_at=clock.monotonic(),
    )
    core.checks.restore(recovered.halves.checks)
    handlers = load_handlers(core, settings.handlers)
    pipeline = Pipeline(handlers)

    def resume(event: Stored | NotStored) -> None:
        pipeline.run(event, after=Persist)

    def place(batch: Batch) -> None:
        pipeline.run(Checked(batch), after=Check)

    core.resume = resume
    core.place = place
    store.after_commit = turn.end
    return core, sessions, pipeline


async def _fail_with_store(store: Store) -> None:
    await store.failed.wait()
    assert store.failure is not None
    raise store.failure


async def _accept(
    listener: socket.socket,
    core: Core,
    sessions: dict[Peer, Session],
    pipeline: Pipeline,
    task_status: trio.TaskStatus[trio.CancelScope],
) -> None:
    async with trio.open_nursery() as connections:
        with trio.CancelScope() as listening:
            task_status.started(listening)
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, address = listener.accept()
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE):
                        log.warning("no file descriptor is left for another connection")
                        await trio.sleep(ACCEPT_PAUSE_SECONDS)
                    continue
                connections.start_soon(_serve_connection, sock, address, core, sessions, pipeline)
        listener.close()


async def _serve_connection(
    sock: socket.socket, address: tuple[str, int], core: Core, sessions: dict[Peer, Session], pipeline: Pipeline
) -> None:
    host, port = address[:2]
    local = ipaddress.ip_address(host).is_loopback
    peer = Peer(f"{host}:{port}", local=local, now=core.clock.monotonic(), touched=core.turn.touch_peer)

    def read(packets: list[Packet]) -> None:
        if packets:
            pipeline.run(PacketsRead(peer, packets))
        core.turn.end()

    with sock:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        session = sessions[peer] = Session(sock, peer, read, core.settings.message_limit + FRAME_OVERHEAD_BYTES)
        core.peers.add(peer)
        try:
            if len(core.peers) > core.settings.connections:
                peer.refuse("too_many_connections", f"this broker serves {core.settings.connections} connections")
                core.turn.end()
            await session.run()
        finally:
            core.peers.discard(peer)
            _forget(core, peer)
            sessions.pop(peer, None)
            if not core.draining:
                core.turn.end()


def _forget(core: Core, peer: Peer) -> None:
    reason = peer.close_reason or "the broker is stopping"
    # A probe of a load balancer connects, says nothing and goes.
    is_probe = not peer.group and reason.startswith((CLOSED, BROKEN))
    if not is_probe and (not peer.accepted or ": " in reason):
        log.warning("connection ended", client=peer.name, group=peer.group, reason=reason)
    else:
        log.debug("connection ended", client=peer.name, group=peer.group, reason=reason)
    core.checks.left(peer)
    if core.deliveries.leave(peer, goodbye=peer.close_reason is None):
        core.router.forget_routes()
