"""Messages on their way from a broker: queued, and the answers to them.

Theory of operation. `Incoming` is the queue of the whole client: batches as the brokers delivered them,
decoded one message at a time when its turn comes. Tags belong to one connection, so `Answers`, what is
to be told the broker about its deliveries, are kept by the connection and die with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from kiteq.limits import ERROR_LENGTH_MAX
from kiteq.remoting.packets import NACK_UNSTARTED, Ack, Deliver, Nack
from kiteq_client.statistics import Counters

__all__ = ["Answers", "Batch", "Incoming", "to_ranges"]

S = TypeVar("S")


class Batch(Generic[S]):
    """The messages of one deliver packet; those before `next` were taken."""

    __slots__ = ("attempts", "blobs", "count", "first_tag", "next", "session")

    def __init__(self, session: S, deliver: Deliver) -> None:
        self.session = session
        self.first_tag = deliver.first_tag
        self.blobs = deliver.messages
        self.count = len(deliver.messages)
        attempts = deliver.attempts
        self.attempts = [attempts] * self.count if type(attempts) is int else attempts
        self.next = 0


class Incoming(Generic[S]):
    """What was delivered and not started.

    The oldest waiting task is woken for each message; `wake` functions stand for these tasks.
    `accepting` tells whether anybody takes messages; a session hands back what arrives when nobody does.
    """

    def __init__(self) -> None:
        self.received = 0
        self.accepting = False
        self._batches: deque[Batch[S]] = deque()
        self._idle: deque[Callable[[], None]] = deque()

    def put(self, batch: Batch[S]) -> None:
        """Queue a batch."""
        self._batches.append(batch)
        self.received += batch.count
        for _ in range(min(batch.count, len(self._idle))):
            self._idle.popleft()()

    def take(self) -> tuple[S, int, bytes, int] | None:
        """Return session, tag, encoded message and attempt of the next message, None if there is none."""
        batches = self._batches
        if not batches:
            return None
        batch = batches[0]
        index = batch.next
        batch.next = following = index + 1
        if following == batch.count:
            batches.popleft()
        return batch.session, batch.first_tag + index, batch.blobs[index], batch.attempts[index]  # type: ignore[index]

    def wake_with(self, wake: Callable[[], None]) -> None:
        """Call `wake` once when there is a message."""
        self._idle.append(wake)

    def no_longer(self, wake: Callable[[], None]) -> None:
        """Take a `wake_with` back."""
        if wake in self._idle:
            self._idle.remove(wake)

    def wake_all(self) -> None:
        """Wake every waiting task, message or not."""
        while self._idle:
            self._idle.popleft()()

    def drop(self, session: S) -> None:
        """Forget what a session delivered: its broker delivers it again to somebody."""
        self._batches = deque(batch for batch in self._batches if batch.session is not session)

    def clear(self) -> list[tuple[S, int, int]]:
        """Empty the queue; return session, first and last tag of what was in it."""
        queued = [
            (batch.session, batch.first_tag + batch.next, batch.first_tag + batch.count - 1) for batch in self._batches
        ]
        self._batches.clear()
        return queued

    def queued_ranges(self, session: S) -> list[tuple[int, int]]:
        """Return first and last tag of everything queued from a session."""
        return [
            (batch.first_tag + batch.next, batch.first_tag + batch.count - 1)
            for batch in self._batches
            if batch.session is session
        ]


class Answers:
    """Acks and nacks of one connection, collected until the next flush.

    flush_at: this many make `ack` and `nack` ask for a flush at once. pending: called when the first one
    is collected. `unsettled` holds the requests that the broker has not confirmed.
    """

    __slots__ = ("_counters", "_nacks", "_pending", "_ranges", "count", "flush_at", "unsettled")

    def __init__(self, flush_at: int, pending: Callable[[], None], counters: Counters) -> None:
        self.flush_at = flush_at
        self.count = 0
        self.unsettled: set[int] = set()
        self._pending = pending
        self._counters = counters
        self._ranges: list[int] = []
        self._nacks: list[list[object]] = []

    def ack(self, tag: int) -> bool:
        """Note that a message is done; return whether to flush now."""
        ranges = self._ranges
        if ranges and ranges[-1] == tag - 1:
            ranges[-1] = tag
        else:
            ranges += (tag, tag)
        self.count = count = self.count + 1
        if count == 1:
            self._pending()
        return count >= self.flush_at

    def nack(self, tag: int, how: int, after_ms: int | None, error: str) -> bool:
        """Note that an attempt failed, that the message is rejected or given back."""
        self._nacks.append([tag, how, after_ms, error[:ERROR_LENGTH_MAX]])
        self.count += 1
        if self.count == 1:
            self._pending()
        return self.count >= self.flush_at

    def hand_back(self, first: int, last: int) -> None:
        """Note that these were not started and may go to somebody else."""
        for tag in range(first, last + 1):
            self.nack(tag, NACK_UNSTARTED, None, "")

    def flush(self, next_request: Callable[[], int]) -> list[Ack | Nack]:
        """Return the packets that say it all, and begin anew."""
        packets: list[Ack | Nack] = []
        if self._ranges:
            self._counters.acked += sum(
                last - first + 1 for first, last in zip(self._ranges[::2], self._ranges[1::2], strict=True)
            )
            packets.append(Ack(next_request(), self._ranges))
            self._ranges = []
        if self._nacks:
            self._counters.nacked += len(self._nacks)
            packets.append(Nack(next_request(), self._nacks))
            self._nacks = []
        self.count = 0
        self.unsettled.update(packet.request for packet in packets)
        return packets

    def settled(self, request: int, stale: list[int]) -> None:
        """Note the broker's confirmation; `stale` ranges had no effect, as their time was over."""
        self.unsettled.discard(request)
        self._counters.stale += sum(last - first + 1 for first, last in zip(stale[::2], stale[1::2], strict=True))


def to_ranges(tags: Iterable[int], ranges: Iterable[tuple[int, int]] = ()) -> list[int]:
    """Return tags and ranges as one flat sorted list of first and last, neighbours joined."""
    flat: list[int] = []
    for first, last in sorted([*ranges, *((tag, tag) for tag in tags)]):
        if flat and first <= flat[-1] + 1:
            flat[-1] = max(flat[-1], last)
        else:
            flat += (first, last)
    return flat
