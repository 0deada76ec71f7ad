"""A broker's part in a cluster: it shares bindings, is announced while it serves, and says who publishes through it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog
import trio

from kiteq.binding.bindings import Binding
from kiteq.pipe.registration import Registration
from kiteq.registry.errors import RegistryError
from kiteq.registry.layout import Server
from kiteq.registry.merging import Key
from kiteq.registry.registry import OpenRegistry, Registry, Snapshot
from kiteq.registry_address import read_credentials
from kiteq.remoting.packets import WIRE_VERSION

if TYPE_CHECKING:
    from kiteq.config import Settings
    from kiteq.pipe.core import Core

__all__ = ["leave", "opener", "run_registration", "stay_announced"]

OPEN_SECONDS: Final = 5.0
"""How long a start waits for the registry, before it goes on with the bindings of the store."""
LOOK_SECONDS: Final = 0.5
"""How often a start that reads the registry looks whether that can still be reached."""
WITHDRAW_SECONDS: Final = 1.0
"""How long a drain waits for the registry: without it, the announcement goes with the session."""
PUBLISHERS_SECONDS: Final = 2.0
"""How often it is looked who publishes here: for people, so it may be late."""
PUBLISHERS_MAX: Final = 1_000
"""Of (topic, group): each is a node of its own."""

log = structlog.get_logger()


def opener(settings: Settings) -> OpenRegistry | None:
    """Return what opens the registry that the settings name, None for a broker that is alone.

    Raises `ConfigError` for credentials that cannot be read.
    """
    url = settings.zkhost
    if url is None:
        return None
    from kiteq.registry.zookeeper import open_registry  # a broker that is alone does not load kazoo

    credentials = read_credentials(os.environ)
    return lambda known: open_registry(
        url,
        log=log,
        credentials=credentials,
        session_timeout=settings.zk_timeout,
        bindings_of=settings.topics or None,
        known=known,
        timeout=OPEN_SECONDS,
    )


async def run_registration(
    core: Core, open_registry: OpenRegistry, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Keep the bindings here and in the registry the same, until cancelled.

    Reports when those of the registry are in force here, or when the registry cannot be reached now.
    Raises `CredentialsRefused`.
    """
    known: dict[Key, Sequence[Binding]] = {
        (outlet.subscription.topic.name, outlet.subscription.group): outlet.subscription.bindings
        for outlet in core.router.outlets()
    }
    async with open_registry(known) as registry:
        registration = Registration(core, registry)
        core.registry, core.registration = registry, registration
        first = await _first_snapshot(registry)
        if first is None:
            log.warning("starting with the bindings of the store", reason=registry.state.reason)
        else:
            await registration.apply(first)
        task_status.started()
        while True:
            await registration.apply(await registry.wait_changed())


async def _first_snapshot(registry: Registry) -> Snapshot | None:
    """Return what the registry holds, however long it is read; None as soon as it cannot be reached."""
    while not registry.state.degraded:
        with trio.move_on_after(LOOK_SECONDS):
            return await registry.wait_changed()
    return None


async def stay_announced(core: Core, address: str, partitions: tuple[int, ...] = ()) -> None:
    """Let clients find this broker at HOST:PORT, and say who publishes through it, until it drains."""
    registry, registration = core.registry, core.registration
    assert registry is not None
    assert registration is not None
    if registry.state.degraded:
        log.warning("this broker is not announced yet", address=address, reason=registry.state.reason)
    await registration.applied.wait()  # who finds this broker is bound here already
    if core.draining:
        return
    server = Server(core.store.broker_id, core.store.epoch, WIRE_VERSION, partitions)
    try:
        await registry.announce(address, server, core.settings.topics)
    except RegistryError as error:  # the registry makes it when it can
        log.warning("this broker is not announced yet", address=address, reason=str(error))
    told: set[Key] = set()
    while not core.draining:
        groups = {(topic, peer.group) for peer in core.peers if peer.accepted for topic in peer.topics}
        if len(groups) > PUBLISHERS_MAX:
            groups = set(sorted(groups)[:PUBLISHERS_MAX])
        if groups != told:
            told = groups
            with suppress(RegistryError):  # for people: nobody misses it until the registry makes it
                await registry.announce_publishers(address, server, groups)
        await trio.sleep(PUBLISHERS_SECONDS)


async def leave(core: Core) -> None:
    """Take back what was announced, so that no more clients come."""
    if core.registry is None:
        return
    try:
        await core.registry.withdraw(timeout=WITHDRAW_SECONDS)
    except RegistryError as error:
        log.warning("the announcement of this broker goes with its session", reason=str(error))
