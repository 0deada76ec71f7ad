"""Half messages on their way to one broker.

Theory of operation. A `Preparation` brings the messages of one transaction, or an addition to it; it is
whole in one packet. What several tasks prepare in the same moment leaves in one packet. They share the
window of messages that are sent and not answered. A packet stays here until the broker answers it, so
that it can be sent again, byte for byte, after a reconnect to the same broker.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final

from kiteq.errors import Refused, RemoteProtocolError, SendTimeout, refusal
from kiteq.limits import PUBLISH_MESSAGES_MAX
from kiteq.message import refuse_too_large
from kiteq.remoting.packets import Enlist, Prepare, Prepared
from kiteq_client.outgoing import FRAME_BYTES, Outgoing
from kiteq_client.unanswered import DRAINING

if TYPE_CHECKING:
    from kiteq_client.broker import Broker

__all__ = ["Preparation", "Preparing"]

logger = logging.getLogger("kiteq_client")

BEGIN: Final = b""
"""The token of a transaction that the broker does not know yet."""


class Preparation:
    """Messages of one transaction, and what the broker says to them.

    token: `BEGIN`, or of the transaction they are added to. topics: one broker must serve all of them.
    body_bytes: of the largest body.
    deadline, finish: as in a `Verdict`. broker: that it was given to. `sent` once a connection took it, and
    `resent` once another did; `ended` once it has an answer or nobody waits for it any more; then `error`,
    or else `handle` as the broker gave it.
    """

    __slots__ = (
        "blobs", "body_bytes", "broker", "check_after_ms", "deadline", "ended", "error", "finish", "handle", "id",
        "resent", "sent", "size", "token", "topics",
    )  # fmt: skip

    def __init__(
        self,
        id: bytes,
        token: bytes,
        blobs: list[bytes],
        body_bytes: int,
        *,
        check_after_ms: int = 0,
        deadline: float,
        topics: frozenset[str] = frozenset(),
    ) -> None:
        self.id = id
        self.topics = topics
        self.token = token
        self.blobs = blobs
        self.size = sum(map(len, blobs))
        self.body_bytes = body_bytes
        self.check_after_ms = check_after_ms
        self.deadline = deadline
        self.broker: Broker | None = None
        self.finish: Callable[[], None] | None = None
        self.sent = self.resent = self.ended = False
        self.handle = 0
        self.error: Exception | None = None

    @property
    def may_be_stored(self) -> bool:
        """Whether the broker may have it: also when it refused a repetition."""
        return self.sent and (self.error is None or self.resent or isinstance(self.error, SendTimeout))

    def give_up(self, error: Exception | None) -> None:
        """End it, well or with an error."""
        if not self.ended:
            self.ended = True
            self.error = error
            if self.finish is not None:
                self.finish()


class _Frame:
    """The preparations of one packet. sent_at: when a connection took it."""

    __slots__ = ("count", "packet", "parts", "sent_at", "size")

    def __init__(self, packet: Prepare | Enlist, parts: list[Preparation], size: int) -> None:
        self.packet = packet
        self.parts = parts
        self.count = len(packet.messages)
        self.size = size
        self.sent_at = monotonic()


class Preparing:
    """The half messages for one broker that it has not answered.

    late: called with what turns out to be durable when nobody waits for it any more. place: called with a
    preparation that begins a transaction and that the broker shuts down too early for.
    """

    def __init__(
        self, outgoing: Outgoing, late: Callable[[Preparation], None], place: Callable[[Preparation], None]
    ) -> None:
        self.waiting: deque[Preparation] = deque()
        self._outgoing = outgoing
        self._late = late
        self._place = place
        self._frames: dict[int, _Frame] = {}
        self._kept: dict[int, _Frame] = {}
        self._in_flight = 0

    @property
    def load(self) -> int:
        """How many messages wait here, or for an answer."""
        return len(self.waiting) + self._in_flight

    @property
    def has_open(self) -> bool:
        """Whether somebody waits for anything here."""
        return self.is_open or any(not part.ended for part in self.waiting) or bool(self._kept)

    @property
    def is_open(self) -> bool:
        """Whether somebody waits for an answer that is on its way."""
        return any(not part.ended for frame in self._frames.values() for part in frame.parts)

    def is_late(self, before: float) -> bool:
        """Whether the oldest packet was sent before that time."""
        for frame in self._frames.values():
            return frame.sent_at < before
        return False

    def take(self, next_request: Callable[[], int], body_bytes_max: int) -> list[Prepare | Enlist]:
        """Return packets with all that waits and that the window has room for."""
        packets: list[Prepare | Enlist] = []
        while self.waiting and (parts := self._fitting(body_bytes_max)):
            first = parts[0]
            for part in parts:
                part.sent = True
            blobs = first.blobs if len(parts) == 1 else [blob for part in parts for blob in part.blobs]
            request = next_request()
            packet: Prepare | Enlist
            if first.token:
                packet = Enlist(request, first.token, blobs)
            else:
                sizes = [len(part.blobs) for part in parts]
                packet = Prepare(request, blobs, sizes[0] if len(set(sizes)) == 1 else sizes, first.check_after_ms)
            self._frames[request] = frame = _Frame(packet, parts, sum(part.size for part in parts))
            self._in_flight += frame.count
            packets.append(packet)
        return packets

    def _fitting(self, body_bytes_max: int) -> list[Preparation]:
        """Take from the queue what the next packet brings; it counts as in flight from now on."""
        waiting = self.waiting
        parts: list[Preparation] = []
        messages = size = 0
        while waiting:
            part = waiting[0]
            if part.body_bytes > body_bytes_max:
                part.give_up(refuse_too_large(part.body_bytes, body_bytes_max))
            if part.ended:
                waiting.popleft()
                continue
            messages += len(part.blobs)
            size += part.size
            if parts and (
                part.token
                or parts[0].token
                or part.check_after_ms != parts[0].check_after_ms
                or messages > PUBLISH_MESSAGES_MAX
                or size > FRAME_BYTES
            ):
                break
            if not self._outgoing.reserve(len(part.blobs), part.size):
                break
            parts.append(waiting.popleft())
        return parts

    def answer(self, packet: Prepared, broker: str) -> None:
        """Hand the answer of a packet to its preparations. Raises `RemoteProtocolError` if it does not fit."""
        frame = self._frames.get(packet.request)
        if frame is None:
            logger.warning("%s answered half messages that were not sent", broker)
            return
        parts = frame.parts
        first = packet.handles
        handles = list(range(first, first + len(parts))) if isinstance(first, int) else first
        exceptions = {item[0]: item for item in packet.exceptions}
        if len(handles) != len(parts) or (exceptions and max(exceptions) >= len(parts)):
            raise RemoteProtocolError(f"the answer to {len(parts)} transactions speaks of others")
        del self._frames[packet.request]
        self._give_back(frame)
        for index, (part, handle) in enumerate(zip(parts, handles, strict=True)):
            if exceptions and (item := exceptions.get(index)) is not None:
                part.give_up(refusal(item[1], item[2], item[3]))
                continue
            part.handle = handle
            if part.ended:
                self._late(part)
            else:
                part.give_up(None)

    def refuse(self, request: int, error: Exception) -> bool:
        """Fail everything of a packet; return False if there is no such packet."""
        frame = self._frames.pop(request, None)
        if frame is None:
            return False
        if isinstance(error, Refused) and error.code == DRAINING:
            self._refused_for_now(request, frame)
            return True
        self._give_back(frame)
        for part in frame.parts:
            part.give_up(error)
        return True

    def _refused_for_now(self, request: int, frame: _Frame) -> None:
        """The broker shuts down: what it may have, or what belongs to a transaction it has, waits for its return."""
        if any(part.resent for part in frame.parts):
            self._kept[request] = frame
            return
        self._give_back(frame)
        for part in frame.parts:
            part.sent = False
            if part.ended:
                continue
            if part.token:
                self.waiting.append(part)
            else:
                self._place(part)

    def _give_back(self, frame: _Frame) -> None:
        self._in_flight -= frame.count
        self._outgoing.give_back(frame.count, frame.size)

    def refuse_all(self, error: Exception) -> None:
        """Fail everything that was sent here."""
        self._restore()
        for request in list(self._frames):
            self.refuse(request, error)

    def forget_given_up(self) -> None:
        """Drop packets nobody waits for any more; for use while there is no connection."""
        for frames in (self._frames, self._kept):
            for request, frame in list(frames.items()):
                if all(part.ended for part in frame.parts):
                    del frames[request]
                    self._give_back(frame)

    def unanswered(self) -> list[Prepare | Enlist]:
        """Return what a new connection has to send again."""
        self.forget_given_up()
        self._restore()
        now = monotonic()
        for frame in self._frames.values():
            frame.sent_at = now
            for part in frame.parts:
                part.resent = True
        return [frame.packet for frame in self._frames.values()]

    def _restore(self) -> None:
        self._frames = {**self._kept, **self._frames}
        self._kept = {}
