"""What becomes of half messages: decided once, and then delivered or gone.

Theory of operation. A transaction is undecided from the moment its row is submitted until a decision is
durable. The first decision takes it (state DECIDING), so that no other one can; those that come meanwhile
wait for its end and are judged by it. A commit needs the messages: they are in memory when the commit
comes soon, and are read from the disk otherwise. Its messages, the removal of the half ones and the decision
itself are one transaction of the store. What is decided is not in memory any more; a late decision is
compared with what the disk says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog
import trio

from kiteq.message import HEAD_OFFSET
from kiteq.pipe.delays import frame_of, save_delayed, split_delayed
from kiteq.pipe.events import Batch, Frame, Kind
from kiteq.store.half_reading import find_decisions, read_halves
from kiteq.store.halves import State
from kiteq.store.writer import Submission

if TYPE_CHECKING:
    from kiteq.errors import StoreError
    from kiteq.pipe.core import Core
    from kiteq.pipe.peer import Peer
    from kiteq.store.halves import Halves
    from kiteq.store.tables import Row

__all__ = ["Transactions"]

log = structlog.get_logger()


SMALL_DECISION: Final = 16
"""The reader waits for the commit of fewer decisions, so that the next ones share a commit; more gain nothing."""

COMMIT_BYTES_MAX: Final = 8 << 20
"""Messages read from the disk for one step of a large commit."""
UNREADABLE_RETRY_MS: Final = 3_600_000
"""A transaction that cannot be read is asked about this much later."""

Exceptions = list[list[Any]]
"""`[index, code, reason, temporary]` of each transaction that was not decided as asked."""


class _Deciding:
    """One request to decide: what is still to be answered of it.

    group: of the client; None for a decision by hand. rows: changes of the store that belong to it.
    """

    __slots__ = ("by", "commit", "done", "exceptions", "group", "left", "peer", "reason", "rows")

    def __init__(
        self,
        count: int,
        done: Callable[[Exceptions], None],
        *,
        commit: bool,
        group: str | None,
        by: str,
        peer: Peer | None,
    ) -> None:
        self.left = count
        self.done = done
        self.commit = commit
        self.group = group
        self.by = by
        self.peer = peer
        self.reason: str | None = None
        self.rows: list[Row] = []
        self.exceptions: Exceptions = []

    def answered(self, count: int = 1) -> None:
        """Note that so many transactions have their answer; the last one answers the request."""
        self.left -= count
        if not self.left:
            self.done(self.exceptions)

    def refuse(self, index: int, code: str, reason: str, *, temporary: bool = False) -> None:
        """Note that one transaction was not decided as asked."""
        self.exceptions.append([index, code, reason, temporary])
        self.answered()


class _Taken(NamedTuple):
    """Transactions that one request decides: places in the request, ids, slots."""

    places: list[int]
    ids: list[bytes]
    slots: list[int]


class Transactions:
    """Takes decisions about the transactions in `store.halves`."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._halves = core.store.halves
        self._waiting: dict[bytes, list[Callable[[], None]]] = {}
        """By transaction id, what is to be done when its decision has ended."""
        self._searching = trio.Lock()
        self._kind: Kind | None = None
        """The kind seen last: the next commit is usually of the same."""

    def decide(
        self,
        tokens: Sequence[bytes],
        done: Callable[[Exceptions], None],
        *,
        commit: bool,
        group: str | None,
        by: str,
        peer: Peer | None = None,
        reason: str | None = None,
        rows: Sequence[Row] = (),
    ) -> None:
        """Decide transactions; `done` gets what was not decided as asked, once the rest is durable.

        tokens: transaction ids, each may be followed by a handle. group: only its own transactions; None for
        any, one at a time. by, reason: who decided and why, for the views. rows: changes of the store that belong
        in the same transaction; they are not made when nothing is decided.
        """
        request = _Deciding(len(tokens), done, commit=commit, group=group, by=by, peer=peer)
        request.reason = reason
        request.rows = list(rows)
        halves = self._halves
        number = None if group is None else halves.known_group(group)
        places, ids, slots, others = halves.take(tokens, number)
        decided: list[tuple[int, bytes]] = []
        for place in others:
            transaction_id = tokens[place][:16]
            slot = halves.find(transaction_id)
            if slot is None or not _is_named(halves, slot, tokens[place], number):
                decided.append((place, transaction_id))  # another one's says nothing about this one
            else:
                self._wait_or_refuse(request, place, transaction_id, slot)
        if slots:
            self._take_decision(request, _Taken(places, ids, slots))
        if decided:
            self._core.start_reading(request.peer, partial(self._compare, request, decided))

    def _wait_or_refuse(self, request: _Deciding, place: int, transaction_id: bytes, slot: int) -> None:
        halves = self._halves
        if halves.state[slot] == State.PREPARING:
            self._unknown(request, place, transaction_id)
            return

        def again() -> None:
            self.decide(
                [transaction_id], told, commit=request.commit, group=request.group, by=request.by,
                peer=request.peer, reason=request.reason, rows=request.rows,
            )  # fmt: skip

        def told(exceptions: Exceptions) -> None:
            request.exceptions += [[place, *exception[1:]] for exception in exceptions]
            request.answered()

        self._waiting.setdefault(transaction_id, []).append(again)

    def _take_decision(self, request: _Deciding, taken: _Taken) -> None:
        if not request.commit:
            submission = Submission(lambda error: self._finish(request, taken, 0, error))
            submission.rows = self._decision_rows(request, taken)
            self._core.store.writer.submit(submission)
            return
        messages = self._halves.messages(taken.slots)
        if messages is None:
            self._core.start_reading(request.peer, partial(self._read_and_commit, request, taken))
        else:
            self._commit(request, taken, messages)

    def _commit(self, request: _Deciding, taken: _Taken, messages: list[list[bytes]]) -> None:
        """Let messages become deliverable, in this order, with the decision in the same transaction."""
        core = self._core
        blobs = list(chain.from_iterable(messages))
        size = sum(map(len, blobs))
        waits = size if len(taken.slots) < SMALL_DECISION else 0
        if request.peer is not None:
            request.peer.uncommitted_bytes += waits
        now_ms = core.clock.epoch_ms()
        frame, by_due = self._uniform(blobs), None
        if frame is None:
            at_once, by_due = split_delayed(blobs, now_ms)
            frame = frame_of(core, at_once) if at_once else None
        batch = Batch(None, [] if frame is None else [frame], size)
        if by_due:
            batch.delayed = save_delayed(core, self._halves.tally(taken.slots[0]).name, by_due, now_ms)
        batch.rows = self._decision_rows(request, taken)
        batch.done = lambda error: self._finish(request, taken, waits, error)
        batch.moves = True
        core.place(batch)

    def _uniform(self, blobs: list[bytes]) -> Frame | None:
        """Return messages that are all of one known kind, without a delay, as a frame."""
        if not blobs:
            return None
        kind = self._kind
        known = kind is not None and self._core.router.kind(kind.prefix) is kind
        if kind is None or not known or not blobs[0].startswith(kind.prefix, HEAD_OFFSET):
            end = HEAD_OFFSET + 4 + int.from_bytes(blobs[0][HEAD_OFFSET : HEAD_OFFSET + 2], "big")
            kind = self._kind = self._core.router.kind(blobs[0][HEAD_OFFSET:end])
        if kind is None:
            return None
        prefix = kind.prefix
        for blob in blobs:
            if not blob.startswith(prefix, HEAD_OFFSET):
                return None
        frame = Frame(0, len(blobs))
        frame.runs.append((kind, blobs))
        return frame

    async def _read_and_commit(self, request: _Deciding, taken: _Taken) -> None:
        """Commit transactions whose messages are on the disk, as many at a time as memory is spared for."""
        core, halves = self._core, self._halves
        left = list(zip(taken.places, taken.ids, taken.slots, strict=True))
        while left:
            await core.store.all_durable()  # so what is being added is on the disk, and one step at a time in memory
            wanted = halves.rows_of(slot for _, _, slot in left)
            read = partial(read_halves, core.store.tables, wanted, bytes_max=COMMIT_BYTES_MAX)
            found = await trio.to_thread.run_sync(read)
            ready, messages = _Taken([], [], []), list[list[bytes]]()
            done = seen = 0
            for place, transaction_id, slot in left:
                if seen == len(found) and found:
                    break
                done += 1
                half = found.get(halves.handle[slot])
                seen += half is not None
                good = [] if half is None else [blob for blob in half.blobs if blob is not None]
                if half is None or len(good) < len(half.blobs):
                    self._unreadable(request, place, transaction_id, slot)  # all of it is delivered, or none
                    continue
                ready.places.append(place)
                ready.ids.append(transaction_id)
                ready.slots.append(slot)
                messages.append(good)
            del left[:done]
            if ready.slots:
                self._commit(request, ready, messages)
            core.turn.end()

    def _unreadable(self, request: _Deciding, place: int, transaction_id: bytes, slot: int) -> None:
        log.error("a transaction is damaged: it can be rolled back only", transaction=transaction_id.hex())
        self._halves.reopen(slot)
        self._core.checks.schedule([slot], self._core.clock.epoch_ms() + UNREADABLE_RETRY_MS)
        request.refuse(place, "damaged", f"transaction {transaction_id.hex()} cannot be read from the store")
        self._call_waiting([transaction_id])

    def _decision_rows(self, request: _Deciding, taken: _Taken) -> list[Row]:
        halves, now_ms = self._halves, self._core.clock.epoch_ms()
        answer = "commit" if request.commit else "rollback"
        rows = self._core.checks.decided(taken.slots, request.by, answer, now_ms)
        rows += halves.decide(
            taken.ids, taken.slots, commit=request.commit, at_ms=now_ms, by=request.by, reason=request.reason
        )
        return rows + request.rows

    def _finish(self, request: _Deciding, taken: _Taken, size: int, error: StoreError | None) -> None:
        core = self._core
        if request.peer is not None:
            request.peer.uncommitted_bytes -= size
            core.turn.touch_peer(request.peer)
        if error is None:
            emptied = self._halves.forget(taken.ids, taken.slots)
            if emptied:
                core.turn.settling().rows += emptied
            core.counters["committed" if request.commit else "rolled_back"] += len(taken.ids)
        else:
            self._halves.undo(taken.slots)
            core.checks.schedule(taken.slots, core.clock.epoch_ms() + int(core.settings.check_after * 1000))
            request.exceptions += [[place, "store_full", str(error), True] for place in taken.places]
        request.answered(len(taken.ids))
        self._call_waiting(taken.ids)

    def _call_waiting(self, transaction_ids: Sequence[bytes]) -> None:
        if self._waiting:
            for transaction_id in transaction_ids:
                for again in self._waiting.pop(transaction_id, ()):
                    again()

    # --- what was decided before ----------------------------------------------------------------

    async def _compare(self, request: _Deciding, decided: list[tuple[int, bytes]]) -> None:
        """Answer a request about transactions that are not open: as they were decided, or nobody knows them."""
        store = self._core.store
        ids = {transaction_id for _, transaction_id in decided}
        async with self._searching:
            find = partial(find_decisions, store.tables, ids, self._halves.next_decision, group=request.group)
            found = await trio.to_thread.run_sync(find)
        for place, transaction_id in decided:
            row, decision = found.get(transaction_id, (None, None))
            if row is None or decision is None:
                self._unknown(request, place, transaction_id)
            elif decision.committed == request.commit:
                request.answered()
            else:
                self._core.counters["conflicts"] += 1
                was = "committed" if decision.committed else "rolled back"
                reason = f"transaction {transaction_id.hex()} was {was} by {row.by}"
                request.refuse(place, "transaction_conflict", reason)

    def _unknown(self, request: _Deciding, place: int, transaction_id: bytes) -> None:
        self._core.counters["unknown_transactions"] += 1
        reason = f"transaction {transaction_id.hex()} is not known here: never prepared, or decided over an hour ago"
        request.refuse(place, "unknown_transaction", reason)


def _is_named(halves: Halves, slot: int, token: bytes, group: int | None) -> bool:
    """Return whether a token of a client of a group, of anybody for None, is that of a transaction."""
    if group is not None and halves.group[slot] != group:
        return False
    return len(token) == 16 or int.from_bytes(token[16:]) == halves.handle[slot]
