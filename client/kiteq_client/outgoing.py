"""Messages on their way to a broker: waiting for room, or sent and not yet answered.

Theory of operation. One `Submission` stands for one call of `send` or `send_many`; nothing is made per
message but its encoding and its receipt. `Outgoing` is the queue and the window of the whole client;
whichever connection can write takes the next `Frame` from it. What a connection has sent stays in its
`Unanswered` until the broker answers, so that it can be sent again, byte for byte, after a reconnect.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from kiteq.errors import KiteQError, RemoteProtocolError, refusal
from kiteq.limits import KIB, PUBLISH_MESSAGES_MAX, UNANSWERED_BYTES_MAX
from kiteq.message import Message, Receipt, refuse_too_large
from kiteq.remoting.packets import RECEIPT_DELAYED, RECEIPT_DUPLICATE, Receipts

__all__ = ["Frame", "Outgoing", "Submission", "Unanswered"]

FRAME_BYTES: Final = 256 * KIB
"""A publish frame is closed at about this size: the broker works on one while the next travels."""

Result = Receipt | Exception
_new_tuple = tuple.__new__


class Submission:
    """The messages of one call, and what became of each.

    deadline: when the call gives up; each answer moves it by `timeout`. finish: called once, at the end.
    """

    __slots__ = ("closed", "deadline", "finish", "messages", "remaining", "results", "taken")

    def __init__(self, messages: Sequence[Message], deadline: float, finish: Callable[[], None]) -> None:
        self.messages = messages
        self.deadline = deadline
        self.finish = finish
        self.results: list[Result | None] = [None] * len(messages)
        self.remaining = len(messages)
        self.taken = 0
        self.closed = False

    def fill(self, start: int, results: Sequence[Result]) -> None:
        """Note the results of the messages from `start` on."""
        self.results[start : start + len(results)] = results
        self.remaining -= len(results)
        if not self.remaining and not self.closed:
            self.closed = True
            self.finish()

    def refuse(self, index: int, error: Exception) -> None:
        """Note that one message failed."""
        self.fill(index, (error,))

    def give_up(self, sent: Exception, unsent: Exception) -> None:
        """End the call now: every message without an answer gets one of these errors."""
        if not self.closed:
            self.closed = True
            self.results = [
                (sent if index < self.taken else unsent) if result is None else result
                for index, result in enumerate(self.results)
            ]
            self.finish()


class Frame:
    """The messages of one publish packet: encoded, and where their results belong."""

    __slots__ = ("blobs", "parts", "request", "size")

    def __init__(self, parts: list[tuple[Submission, int, int]], blobs: list[bytes]) -> None:
        self.parts = parts
        self.blobs = blobs
        self.size = sum(map(len, blobs))
        self.request = 0


class Outgoing:
    """What waits to be sent, and the window: how much may be unanswered at a time.

    ready: called when there may be something to take.
    """

    def __init__(self, messages_max: int, ready: Callable[[], None]) -> None:
        self.messages_max = messages_max
        self.in_flight = 0
        self.in_flight_bytes = 0
        self._waiting: deque[Submission] = deque()
        self._ready = ready
        self._wanted = False

    def submit(self, submission: Submission) -> None:
        """Queue the messages of a call."""
        self._waiting.append(submission)
        self._ready()

    def withdraw(self, submission: Submission) -> None:
        """Forget what of a call has not been taken yet."""
        if submission in self._waiting:
            self._waiting.remove(submission)
            self._ready()

    def take(self, body_bytes_max: int) -> Frame | None:
        """Return the next frame that the window has room for; it counts as in flight from now on."""
        if self._wanted:
            return None
        parts: list[tuple[Submission, int, int]] = []
        blobs: list[bytes] = []
        room = min(self.messages_max - self.in_flight, PUBLISH_MESSAGES_MAX)
        room_bytes = min(UNANSWERED_BYTES_MAX - self.in_flight_bytes, FRAME_BYTES)
        waiting = self._waiting
        while waiting and room > 0:
            submission = waiting[0]
            start = submission.taken
            messages = submission.messages[start : start + room]
            sizes = [len(message.body) for message in messages]
            if max(sizes) > body_bytes_max or sum(sizes) > room_bytes:
                messages = messages[: _leading(sizes, body_bytes_max, room_bytes) or 1]
            at_once = not blobs and not self.in_flight
            if sizes[0] > body_bytes_max:
                self._refuse_next(submission, refuse_too_large(sizes[0], body_bytes_max))
                continue
            new = self._encode(submission, messages)
            if not new:
                continue
            fitting = _leading(list(map(len, new)), FRAME_BYTES, room_bytes)
            if not fitting:
                # A message larger than a frame or the window travels alone.
                if not (at_once or (not blobs and len(new[0]) > FRAME_BYTES and self._has_bytes_for(new[0]))):
                    break
                fitting = 1
            taken = new[:fitting]
            parts.append((submission, start, start + fitting))
            blobs += taken
            submission.taken += fitting
            room -= fitting
            room_bytes -= sum(map(len, taken))
            if submission.taken == len(submission.messages):
                waiting.popleft()
        if not blobs:
            return None
        frame = Frame(parts, blobs)
        self.in_flight += len(blobs)
        self.in_flight_bytes += frame.size
        return frame

    def release(self, frame: Frame) -> None:
        """Give the room of a frame back."""
        self.give_back(len(frame.blobs), frame.size)

    def reserve(self, messages: int, size: int) -> bool:
        """Take room for messages that do not come from here; while they wait for it, others get none."""
        if self.in_flight and (
            self.in_flight + messages > self.messages_max or self.in_flight_bytes + size > UNANSWERED_BYTES_MAX
        ):
            self._wanted = True
            return False
        self.in_flight += messages
        self.in_flight_bytes += size
        return True

    def give_back(self, messages: int, size: int) -> None:
        """Give room back."""
        self.in_flight -= messages
        self.in_flight_bytes -= size
        if self._waiting or self._wanted:
            self.want_no_more()

    def want_no_more(self) -> None:
        """Let everybody look for room again: there is more, or who waited for it does so no longer."""
        self._wanted = False
        self._ready()

    def _has_bytes_for(self, blob: bytes) -> bool:
        return self.in_flight_bytes + len(blob) <= UNANSWERED_BYTES_MAX

    def _encode(self, submission: Submission, messages: Sequence[Message]) -> list[bytes]:
        """Encode up to the first message that cannot be; if that is the very first, refuse it."""
        blobs: list[bytes] = []
        try:
            # A loop inside `try`, not a `try` in the loop; and the list keeps what was done before an error.
            blobs.extend(message.encoded() for message in messages)
        except (ValueError, KiteQError) as error:
            if not blobs:
                self._refuse_next(submission, error)
        return blobs

    def _refuse_next(self, submission: Submission, error: Exception) -> None:
        index = submission.taken
        submission.taken += 1
        if submission.taken == len(submission.messages):
            self._waiting.popleft()
        submission.refuse(index, error)


def _leading(sizes: Sequence[int], size_max: int, sum_max: int) -> int:
    """Return how many of the first ones are each at most `size_max` and together at most `sum_max`."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if size > size_max or total > sum_max:
            return count
    return len(sizes)


class Unanswered:
    """The frames sent to one broker that it has not answered, in order of sending."""

    def __init__(self, outgoing: Outgoing, timeout: float) -> None:
        self.frames: dict[int, Frame] = {}
        self._outgoing = outgoing
        self._timeout = timeout

    def add(self, request: int, frame: Frame) -> None:
        """Note that a frame is sent as this request."""
        frame.request = request
        self.frames[request] = frame

    def answer(self, receipts: Receipts, broker: str, now: float) -> int:
        """Hand the receipts of a frame to its submissions; return how many, 0 for an unknown frame.

        Raises `RemoteProtocolError` if they do not fit the frame.
        """
        frame = self.frames.get(receipts.request)
        if frame is None:
            return 0
        count = len(frame.blobs)
        groups = receipts.groups
        if (type(groups) is list and len(groups) != count) or any(item[0] >= count for item in receipts.exceptions):
            raise RemoteProtocolError(f"receipts for {count} messages speak of others")
        del self.frames[receipts.request]
        self._outgoing.release(frame)
        exceptions = {item[0]: item for item in receipts.exceptions}
        at = 0
        for submission, start, stop in frame.parts:
            messages = submission.messages[start:stop]
            durable = receipts.durable
            results: list[Result]
            if type(groups) is int:
                results = [_new_tuple(Receipt, (message.id, broker, groups, False, durable)) for message in messages]
            else:
                results = [
                    Receipt(message.id, broker, groups[at + index], False, durable)  # type: ignore[index]
                    for index, message in enumerate(messages)
                ]
            if exceptions:
                for index in range(len(results)):
                    if (item := exceptions.get(at + index)) is not None:
                        results[index] = _exceptional(item, messages[index], broker, durable=durable)
            at += stop - start
            submission.deadline = now + self._timeout
            if not submission.closed:
                submission.fill(start, results)
        return count

    def refuse(self, request: int, error: Exception) -> bool:
        """Fail every message of a frame; return False if there is no such frame."""
        frame = self.frames.pop(request, None)
        if frame is None:
            return False
        self._outgoing.release(frame)
        for submission, start, stop in frame.parts:
            if not submission.closed:
                submission.fill(start, [error] * (stop - start))
        return True

    def refuse_all(self, error: Exception) -> None:
        """Fail every message here."""
        for request in list(self.frames):
            self.refuse(request, error)

    def forget_given_up(self) -> None:
        """Drop frames nobody waits for any more; for use while there is no connection."""
        for request, frame in list(self.frames.items()):
            if all(submission.closed for submission, _, _ in frame.parts):
                del self.frames[request]
                self._outgoing.release(frame)


def _exceptional(item: list[object], message: Message, broker: str, *, durable: bool) -> Result:
    _, code, reason, temporary = item[:4]
    if code in (RECEIPT_DUPLICATE, RECEIPT_DELAYED):
        return Receipt(message.id, broker, None, duplicate=code == RECEIPT_DUPLICATE, durable=durable)
    return refusal(str(code), str(reason), bool(temporary))
