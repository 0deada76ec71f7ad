"""The process that runs the workers: it starts them, starts them again, and holds what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import trio

from kiteq.binding.bindings import Binding, from_wire
from kiteq.config import Settings
from kiteq.errors import KiteQError, Refused
from kiteq.registry.merging import Key
from kiteq.workers.board import Board
from kiteq.workers.channel import Channel, Message
from kiteq.workers.member import Member, status_text
from kiteq.workers.plan import known_to_clients, settings_of, with_ports

__all__ = ["Supervisor", "WorkerFailed"]

LAST_WORDS_SECONDS: Final = 1.0
"""What a worker said before it ended is read within this."""
DRAIN_MARGIN_SECONDS: Final = 30.0
"""A worker that takes longer than its `drain_timeout` and this hangs; nothing durable is lost by ending it."""

log = structlog.get_logger()


class WorkerFailed(KiteQError):
    """A worker could not be started the first time. status: what its process has ended with."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Supervisor:
    """Runs the workers of a set.

    settings: of the set. ready: called once when every worker serves.
    """

    def __init__(self, settings: Settings, ready: Callable[[], None] = lambda: None) -> None:
        self.members = [Member(number, one) for number, one in enumerate(settings_of(settings))]
        self._patience = settings.drain_timeout + DRAIN_MARGIN_SECONDS
        self._ready = ready
        self._complete = False
        self._failed: WorkerFailed | None = None
        self._board = Board()
        self._draining = trio.Event()

    async def run(self) -> None:
        """Run the workers until they are drained. Raises `WorkerFailed` when one cannot be started at first."""
        async with trio.open_nursery() as nursery:
            for member in self.members:
                nursery.start_soon(self._keep, member)
        if self._failed is not None:
            raise self._failed

    def drain(self) -> None:
        """Have every worker drain, and end `run` when the last one has ended."""
        self._draining.set()
        for member in self.members:
            member.post("drain")

    def kill(self) -> None:
        """End every worker at once."""
        for member in self.members:
            member.kill()

    async def _keep(self, member: Member) -> None:
        while not self._draining.is_set():
            started = trio.current_time()
            try:
                status = await self._live(member)
            except OSError as error:
                status, member.failure = 1, (f"worker {member.number} cannot be started: {error}", 1)
            reason = None if member.failure is None else member.failure[0]
            pid = None if member.process is None else member.process.pid
            if self._draining.is_set():
                if status and self._failed is None:
                    log.error(
                        "a worker has failed while draining", worker=member.number, pid=pid,
                        status=status_text(status), reason=reason,
                    )  # fmt: skip
                return
            if member.address is None:
                said = reason or f"worker {member.number} has ended with status {status_text(status)} at its start"
                self._failed = WorkerFailed(said, member.failure[1] if member.failure else 1)
                self.drain()
                return
            wait = member.backoff.wait_after(trio.current_time() - started)
            log.error(
                "a worker has ended and is started again", worker=member.number, pid=pid,
                status=status_text(status), reason=reason, wait_seconds=wait,
            )  # fmt: skip
            with trio.move_on_after(wait):
                await self._draining.wait()

    async def _live(self, member: Member) -> int:
        """Run one process of a worker to its end; return its status."""
        async with member.running(self._board.nodes) as process:
            assert member.channel is not None
            if self._draining.is_set():
                member.post("drain")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(member.channel.write)
                nursery.start_soon(self._end_in_time, member, process)
                try:
                    heard = trio.Event()
                    nursery.start_soon(self._listen, member, member.channel, heard)
                    status: int = await process.wait()
                    with trio.move_on_after(LAST_WORDS_SECONDS):
                        await heard.wait()
                finally:
                    nursery.cancel_scope.cancel()
        return status

    async def _end_in_time(self, member: Member, process: trio.Process) -> None:
        await self._draining.wait()
        await trio.sleep(self._patience)
        log.error("a worker does not end and is killed", worker=member.number, pid=process.pid)
        process.kill()

    async def _listen(self, member: Member, channel: Channel, heard: trio.Event) -> None:
        while (message := await channel.receive()) is not None:
            self._obey(member, message)
        heard.set()

    def _obey(self, member: Member, message: Message) -> None:
        match message:
            case ("ready", address, http):
                self._note_ready(member, address, http)
            case ("failed", sentence, status):
                member.failure = sentence, status
            case ("stop",):
                if not self._draining.is_set():
                    log.info("a worker was asked to drain: all of them do", worker=member.number)
                    self.drain()
            case ("known", nodes):
                self._learn(member, nodes)
            case ("open",):
                member.open(self._board.nodes)
            case ("merge" | "remove" as verb, request, topic, group, wire):
                self._change(member, verb, request, (topic, group), [from_wire(fields) for fields in wire])
            case _:
                raise AssertionError(f"a worker says {message[:1]}")

    def _note_ready(self, member: Member, address: str, http: str | None) -> None:
        member.address, member.http = address, http
        member.settings = with_ports(member.settings, address, http)
        if not self._complete and all(one.address is not None for one in self.members):
            self._complete = True
            self._ready()
            for one in self.members:
                self._tell_neighbours(one)
        elif self._complete:
            self._tell_neighbours(member)

    def _tell_neighbours(self, member: Member) -> None:
        member.post("neighbours", [known_to_clients(one.settings, one.address) for one in self.members if one.address])

    def _learn(self, member: Member, nodes: tuple[tuple[str, str, tuple[tuple[object, ...], ...]], ...]) -> None:
        changed: list[Key] = []
        for topic, group, wire in nodes:
            try:
                if self._board.learn((topic, group), [from_wire(fields) for fields in wire]):
                    changed.append((topic, group))
            except Refused as error:
                log.warning(
                    "bindings in the store of a worker contradict those of the others and are not taken",
                    worker=member.number, topic=topic, group=group, reason=error.reason,
                )  # fmt: skip
        self._note_changed(changed)

    def _change(self, member: Member, verb: str, request: int, key: Key, bindings: list[Binding]) -> None:
        refused: Refused | None = None
        try:
            if verb == "remove":
                self._note_changed(self._board.remove(key, bindings))
            elif self._board.merge(key, bindings):
                self._note_changed([key])
        except Refused as error:
            refused = error
        code, reason = (None, None) if refused is None else (refused.code, refused.reason)
        member.post("done", request, code, reason)

    def _note_changed(self, keys: list[Key]) -> None:
        if keys:
            for member in self.members:
                member.note_changed(keys)
