"""Answers administrative requests."""

from __future__ import annotations

import heapq
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from kiteq.binding.bindings import Kind
from kiteq.errors import Refused
from kiteq.message import BadMessage, parse_extras, split
from kiteq.pipe.broker_verbs import BrokerVerbs
from kiteq.pipe.delays import cancel
from kiteq.pipe.events import AdminAsked
from kiteq.pipe.registration import drop_shared, unbind_shared
from kiteq.pipe.reports import outlet_row, outlet_rows, stat
from kiteq.pipe.settlement import head_of
from kiteq.pipe.transaction_views import TransactionViews
from kiteq.remoting.packets import AdminReply, Refusal
from kiteq.store.state import DeadLetter
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.pipe.core import Core
    from kiteq.pipe.groups import Group
    from kiteq.pipe.outlet import Outlet
    from kiteq.pipe.peer import Peer

__all__ = ["Administer"]

DEAD_LETTERS_LISTED_MAX = 1_000
"""Of one answer: it must fit a frame."""

REQUESTS_MAX = 16
"""Requests worked on at once; each may hold a page of dead letters."""

FOR_EVERYBODY = frozenset({"stat", "group.list", "broker.show", "overview"})
"""Counts, and names of topics and groups: a cluster on several machines can be looked at. No messages, no clients."""

NOT_ALLOWED = (
    "only clients over loopback may administrate: run this on the broker's machine, with --broker 127.0.0.1:PORT"
)

Arguments = dict[str, Any]


class Administer:
    """One method for each verb; what it returns is answered once what it changed is durable."""

    accepts = (AdminAsked,)
    emits = ()

    def __init__(self, core: Core) -> None:
        self._core = core
        self._requests = 0
        self._dead_letters = trio.Lock()
        """Held from reading dead letters until what happens to them is durable, so that it happens once."""
        self._verbs: dict[str, Callable[[Arguments], Any]] = {
            "stat": self._stat,
            "group.list": self._group_list,
            "group.show": self._group_show,
            "group.drop": self._group_drop,
            "group.unsubscribe": self._group_unsubscribe,
            "dlq.list": self._dlq_list,
            "dlq.show": self._dlq_show,
            "dlq.replay": self._dlq_replay,
            "dlq.purge": self._dlq_purge,
            "msg.cancel": partial(cancel, core),
            **TransactionViews(core).verbs,
            **BrokerVerbs(core).verbs,
        }

    def handle(self, event: AdminAsked) -> tuple[()]:
        """Start a task for the request: some read the disk."""
        peer, packet = event.peer, event.packet
        if not peer.local and packet.verb not in FOR_EVERYBODY:
            peer.send(Refusal(packet.request, "not_allowed", NOT_ALLOWED, False))
        elif packet.verb not in self._verbs:
            known = ", ".join(self._verbs)
            peer.send(Refusal(packet.request, "unknown_verb", f"{packet.verb!r} is none of {known}"[:500], False))
        elif self._requests >= REQUESTS_MAX:
            reason = f"the broker works on {REQUESTS_MAX} administrative requests already"
            peer.send(Refusal(packet.request, "busy", reason, True))
        else:
            self._requests += 1
            assert self._core.deliveries.nursery is not None
            self._core.deliveries.nursery.start_soon(self._answer, peer, packet.request, packet.verb, packet.arguments)
        return ()

    async def _answer(self, peer: Peer, request: int, verb: str, arguments: Arguments) -> None:
        try:
            result = self._verbs[verb](arguments | {"client": peer.name})
            if hasattr(result, "__await__"):
                result = await result
        except Refused as refused:
            peer.send(Refusal(request, refused.code, refused.reason, refused.temporary))
        else:
            peer.send(AdminReply(request, result))
        finally:
            self._requests -= 1
        self._core.turn.end()

    # --- groups -------------------------------------------------------------------------------

    async def _stat(self, _arguments: Arguments) -> dict[str, Any]:
        return await stat(self._core)

    def _group(self, arguments: Arguments) -> Group:
        name = arguments.get("group")
        group = self._core.deliveries.groups.get(name) if isinstance(name, str) else None
        if group is None or not (group.outlets or group.members):
            raise Refused("unknown_group", f"there is no group {name!r} here"[:300])
        return group

    async def _group_list(self, _arguments: Arguments) -> list[dict[str, Any]]:
        return sorted(await outlet_rows(self._core), key=lambda row: (row["group"], row["topic"]))

    def _group_show(self, arguments: Arguments) -> dict[str, Any]:
        group = self._group(arguments)
        return {
            "group": group.name,
            "topics": [outlet_row(outlet) for _, outlet in sorted(group.outlets.items())],
            "connections": [
                {"client": member.name, "window": member.window, "in_flight": member.in_flight}
                for member in group.members
            ],
        }

    async def _group_drop(self, arguments: Arguments) -> dict[str, int]:
        group = self._group(arguments)
        outlets = list(group.outlets.values())
        rows = [outlet_row(outlet) for outlet in outlets]
        dropped = {name: sum(row[name] for row in rows) for name in ("pending", "retrying", "dead")}
        for outlet in outlets:
            if not outlet.closed:  # else another request was faster
                await drop_shared(self._core, outlet)
        return dropped

    async def _group_unsubscribe(self, arguments: Arguments) -> dict[str, Any]:
        group = self._group(arguments)
        kinds = {kind.name.lower(): kind for kind in Kind}
        topic, pattern = arguments.get("topic"), arguments.get("pattern")
        kind = kinds.get(str(arguments.get("kind")))
        if kind is None or not isinstance(topic, str) or not isinstance(pattern, str):
            raise Refused("bad_argument", "say topic, kind (direct, regex or fanout) and pattern")
        finished = trio.Event()
        outlet = group.outlets.get(topic)
        before = outlet_row(outlet) if outlet is not None else {}
        removed = unbind_shared(self._core, group.name, topic, kind, pattern, lambda _error: finished.set())
        self._core.turn.end()
        await finished.wait()
        left = topic in group.outlets
        return {"removed": removed, "pending": 0 if left or not removed else before.get("pending", 0), "bound": left}

    # --- dead letters -------------------------------------------------------------------------

    async def _each_page(
        self, arguments: Arguments, use: Callable[[Outlet, list[DeadLetter]], Awaitable[bool]]
    ) -> None:
        """Call `use` with a page after the other of the dead letters asked for, until it returns False."""
        group = self._group(arguments)
        topic, wanted = arguments.get("topic"), arguments.get("id")
        found = False
        for name, outlet in sorted(group.outlets.items()):
            left = outlet.subscription.dead if topic in (None, name) else 0  # not what dies again meanwhile
            after = b""
            while left > 0:
                page = await trio.to_thread.run_sync(self._core.store.read_dead, outlet.subscription, after)
                if not page or outlet.closed:
                    break
                after = page[-1].key
                asked = [letter for letter in page[:left] if wanted in (None, letter.message_id.hex())]
                left -= len(page)
                found = found or bool(asked)
                if asked and not await use(outlet, asked):
                    return
        if wanted is not None and not found:
            raise Refused("unknown_message", f"group {group.name!r} has no dead letter {wanted!r}"[:300])

    async def _dlq_list(self, arguments: Arguments) -> list[dict[str, Any]]:
        limit = arguments.get("limit", 100)
        if type(limit) is not int or not 1 <= limit <= DEAD_LETTERS_LISTED_MAX:
            raise Refused("bad_argument", f"limit is 1 to {DEAD_LETTERS_LISTED_MAX}")
        rows: list[dict[str, Any]] = []

        async def take(outlet: Outlet, letters: list[DeadLetter]) -> bool:
            rows.extend(_letter_row(outlet, letter) for letter in letters[: limit - len(rows)])
            return len(rows) < limit

        await self._each_page(arguments, take)
        return rows

    async def _dlq_show(self, arguments: Arguments) -> dict[str, Any]:
        if not isinstance(arguments.get("id"), str):
            raise Refused("bad_argument", "say the id of the message")
        row: dict[str, Any] = {}

        async def take(outlet: Outlet, letters: list[DeadLetter]) -> bool:
            row.clear()
            row.update(_whole_letter(outlet, letters[-1]))
            return True  # the latest of them is shown

        await self._each_page(arguments, take)
        return row

    async def _dlq_replay(self, arguments: Arguments) -> dict[str, int]:
        """Give dead letters to their group again, with a fresh count of attempts and a fresh TTL."""
        replayed = 0

        async def take(outlet: Outlet, letters: list[DeadLetter]) -> bool:
            nonlocal replayed
            await self._replay(outlet, letters)
            replayed += len(letters)
            return True

        async with self._dead_letters:
            await self._each_page(arguments, take)
        return {"replayed": replayed}

    async def _replay(self, outlet: Outlet, letters: list[DeadLetter]) -> None:
        submission = Submission()
        now_ms = self._core.clock.epoch_ms()
        topic = outlet.subscription.topic
        for letter in letters:
            head = head_of(letter.blob)
            sequence = topic.next_sequence
            topic.next_sequence += 1
            expires_ms = now_ms + (head.ttl_ms if head is not None else 0)
            due: list[object] = [now_ms, 0, expires_ms, [], now_ms]
            self._core.store.save_retry(outlet.subscription, sequence, letter.blob, due, submission)
            self._core.store.forget_dead(outlet.subscription, letter, submission)
            outlet.replaying.append((now_ms, sequence))
        await self._core.store.write(submission)
        while outlet.replaying:
            heapq.heappush(outlet.due, outlet.replaying.pop())
        self._core.turn.outlets[outlet] = None
        self._core.turn.end()

    async def _dlq_purge(self, arguments: Arguments) -> dict[str, int]:
        purged = 0

        async def take(outlet: Outlet, letters: list[DeadLetter]) -> bool:
            nonlocal purged
            submission = Submission()
            for letter in letters:
                self._core.store.forget_dead(outlet.subscription, letter, submission)
            await self._core.store.write(submission)
            purged += len(letters)
            return True

        async with self._dead_letters:
            await self._each_page(arguments, take)
        return {"purged": purged}


def _whole_letter(outlet: Outlet, letter: DeadLetter) -> dict[str, Any]:
    row = _letter_row(outlet, letter)
    row["history"] = [{"at_ms": at, "client": client, "error": text} for at, client, text in letter.history]
    try:
        _, extras, body_at = split(letter.blob)
        row["properties"] = dict(parse_extras(extras).properties)
        row["body"] = letter.blob[body_at:-4]
    except BadMessage as bad:
        row["properties"], row["body"] = {}, letter.blob
        row["damaged"] = bad.reason
    return row


def _letter_row(outlet: Outlet, letter: DeadLetter) -> dict[str, Any]:
    head = head_of(letter.blob)
    return {
        "id": letter.message_id.hex(),
        "topic": outlet.subscription.topic.name,
        "message_type": "?" if head is None else head.message_type,
        "reason": letter.reason,
        "error": letter.history[-1][2] if letter.history else "",
        "attempts": letter.attempts,
        "at_ms": letter.at_ms,
        "bytes": len(letter.blob),
    }
