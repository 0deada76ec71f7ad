"""Messages on their way to a broker: waiting for room, or sent and not yet answered.

Theory of operation. One `Submission` stands for one call of `send` or `send_many`; nothing is made per
message but its encoding and its receipt. `Outgoing` is the queue and the window of the whole client, with
one lane for all messages, or one for each topic where brokers serve different ones; whichever connection
can write takes the next `Frame` from it. What a connection has sent stays in its `Unanswered`. A message that
is sent a second time has a lane for the broker that was given it first: only that one knows it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Final

from kiteq.errors import KiteQError
from kiteq.limits import KIB, PUBLISH_MESSAGES_MAX, UNANSWERED_BYTES_MAX
from kiteq.message import Message, Receipt, refuse_too_large

__all__ = ["EVERY_TOPIC", "Frame", "Outgoing", "Piece", "Result", "Submission"]

FRAME_BYTES: Final = 256 * KIB
"""A publish frame is closed at about this size: the broker works on one while the next travels."""
EVERY_TOPIC: Final = ""
"""The lane of all messages, where every broker serves every topic."""

Result = Receipt | Exception


class Submission:
    """The messages of one call, and what became of each.

    deadline: when the call gives up; each answer moves it by `timeout`. finish: called once, at the end.
    number: of the call; later ones have larger numbers.
    """

    __slots__ = ("closed", "deadline", "finish", "messages", "number", "pieces", "remaining", "results")

    def __init__(self, messages: Sequence[Message], deadline: float, finish: Callable[[], None]) -> None:
        self.messages = messages
        self.deadline = deadline
        self.finish = finish
        self.number = 0
        self.results: list[Result | None] = [None] * len(messages)
        self.remaining = len(messages)
        self.pieces: list[Piece] = []
        self.closed = False

    def unsent_topics(self) -> set[str]:
        """Return the topics of which messages wait to be sent."""
        return {message.topic for piece in self.pieces for message in piece.messages[piece.taken :]}

    def give_up(self, sent: Exception, unsent: Exception) -> None:
        """End the call now: every message without an answer gets one of these errors."""
        if not self.closed:
            waiting = {index for piece in self.pieces for index in piece.indexes()[piece.taken :]}
            self.results = [
                (unsent if index in waiting else sent) if result is None else result
                for index, result in enumerate(self.results)
            ]
            self.close()

    def close(self) -> None:
        """End the call: it has all its results."""
        self.closed = True
        # They refer to each other: without this only the garbage collector frees them, for 10 µs a message.
        self.pieces.clear()
        self.finish()


class Piece:
    """The messages of a submission that wait in one lane, in order; those before `taken` do not wait any more.

    places: their indexes in the submission; None when they are all of it.
    """

    __slots__ = ("messages", "places", "submission", "taken")

    def __init__(self, submission: Submission, messages: Sequence[Message], places: Sequence[int] | None) -> None:
        self.submission = submission
        self.messages = messages
        self.places = places
        self.taken = 0
        submission.pieces.append(self)

    @property
    def turn(self) -> tuple[int, int]:
        """Return what orders the pieces of a lane: the call, and where in it the first message that waits is."""
        return self.submission.number, self.indexes()[self.taken]

    def indexes(self) -> Sequence[int]:
        """Return the places of all its messages in the submission."""
        return range(len(self.messages)) if self.places is None else self.places

    def fill(self, start: int, results: Sequence[Result]) -> None:
        """Note the results of the messages from `start` on."""
        submission = self.submission
        if submission.closed:
            return
        if self.places is None:
            submission.results[start : start + len(results)] = results
        else:
            for index, result in zip(self.places[start : start + len(results)], results, strict=True):
                submission.results[index] = result
        submission.remaining -= len(results)
        if not submission.remaining:
            submission.close()


class Frame:
    """The messages of one publish packet: encoded, and where their results belong.

    sent_at: when a connection took it. resent: another connection has, so the broker may have it.
    given_up: nobody waits for it any more, and its room is free for others.
    """

    __slots__ = ("blobs", "given_up", "parts", "request", "resent", "sent_at", "size")

    def __init__(self, parts: list[tuple[Piece, int, int]], blobs: list[bytes]) -> None:
        self.parts = parts
        self.blobs = blobs
        self.size = sum(map(len, blobs))
        self.request = 0
        self.sent_at = 0.0
        self.resent = self.given_up = False

    def given_to(self, broker: str) -> None:
        """Note in its messages which broker takes them."""
        for piece, start, stop in self.parts:
            for message in piece.messages[start:stop]:
                message.given_to = broker

    def is_wanted(self) -> bool:
        """Whether anybody waits for its answer."""
        return any(not piece.submission.closed for piece, _, _ in self.parts)


class Lane:
    """Pieces that wait, and how many messages they have; of one topic, or of every one.

    broker: who takes them before others, because it was given them before; "" if it does not matter.
    """

    __slots__ = ("broker", "count", "pieces", "topic")

    def __init__(self, topic: str, broker: str) -> None:
        self.topic = topic
        self.broker = broker
        self.pieces: deque[Piece] = deque()
        self.count = 0


class Outgoing:
    """What waits to be sent, and the window: how much may be unanswered at a time.

    ready: called when there may be something to take. topics: called with the topics of each submission;
    None for a client whose brokers all serve every topic. has_givers: there is more than one broker, so messages
    note who was given them.
    """

    def __init__(
        self, messages_max: int, ready: Callable[[], None], topics: Callable[[set[str]], None] | None = None
    ) -> None:
        self.messages_max = messages_max
        self.in_flight = 0
        self.in_flight_bytes = 0
        self.lanes: dict[str, Lane] = {}
        self.has_givers = False
        self._turn = 0
        self._ready = ready
        self._topics = topics
        self._wanted = False

    @property
    def has_room(self) -> bool:
        """Whether plain messages may be sent now."""
        return not self._wanted and self.in_flight < self.messages_max and self.in_flight_bytes < UNANSWERED_BYTES_MAX

    def next_turn(self) -> int:
        """Return a number that rises with each call."""
        self._turn += 1
        return self._turn

    def submit(self, submission: Submission) -> None:
        """Queue the messages of a call."""
        messages = submission.messages
        submission.number = self.next_turn()
        if self._topics is None and not self.has_givers:
            self._queue(EVERY_TOPIC, "", Piece(submission, messages, None))
            self._ready()
            return
        by_topic = self._topics is not None
        topics = {message.topic for message in messages} if by_topic else {EVERY_TOPIC}
        if len(topics) == 1 and not any(message.given_to for message in messages):
            self._queue(messages[0].topic if by_topic else EVERY_TOPIC, "", Piece(submission, messages, None))
        else:
            places: dict[tuple[str, str], list[int]] = {}
            for index, message in enumerate(messages):
                way = message.topic if by_topic else EVERY_TOPIC, message.given_to
                places.setdefault(way, []).append(index)
            for (topic, broker), indexes in places.items():
                self._queue(topic, broker, Piece(submission, [messages[index] for index in indexes], indexes))
        if self._topics is not None:
            self._topics(topics)
        self._ready()

    def submit_again(self, frame: Frame) -> None:
        """Queue the messages of a frame that no broker has, before whatever was to be sent after them."""
        for piece, start, stop in frame.parts:
            submission = piece.submission
            if not submission.closed:
                places = piece.indexes()[start:stop]
                again = Piece(submission, piece.messages[start:stop], places)
                self._queue(EVERY_TOPIC if self._topics is None else again.messages[0].topic, "", again)
        self._ready()

    def _queue(self, topic: str, broker: str, piece: Piece) -> None:
        name = f"{topic} {broker}" if broker else topic  # no topic has a space
        lane = self.lanes.get(name)
        if lane is None:
            lane = self.lanes[name] = Lane(topic, broker)
        turn, waiting = piece.turn, lane.pieces
        if not waiting or waiting[-1].turn < turn:
            waiting.append(piece)
        else:
            waiting.insert(sum(1 for _ in takewhile(lambda one: one.turn < turn, waiting)), piece)
        lane.count += len(piece.messages)

    def withdraw(self, submission: Submission) -> None:
        """Forget what of a call has not been taken yet."""
        found = False
        for lane in self.lanes.values():
            for piece in [one for one in lane.pieces if one.submission is submission]:
                lane.pieces.remove(piece)
                lane.count -= len(piece.messages) - piece.taken
                found = True
        if found:
            self._ready()

    def take(
        self, body_bytes_max: int, lane: str = EVERY_TOPIC, messages_max: int = PUBLISH_MESSAGES_MAX,
        bytes_max: int = UNANSWERED_BYTES_MAX,
    ) -> Frame | None:  # fmt: skip
        """Return the next frame of a lane that the window and these bounds have room for; it counts as in flight."""
        if self._wanted or (queue := self.lanes.get(lane)) is None:
            return None
        parts: list[tuple[Piece, int, int]] = []
        blobs: list[bytes] = []
        room = min(self.messages_max - self.in_flight, messages_max, PUBLISH_MESSAGES_MAX)
        room_bytes = min(UNANSWERED_BYTES_MAX - self.in_flight_bytes, bytes_max, FRAME_BYTES)
        waiting = queue.pieces
        while waiting and room > 0:
            piece = waiting[0]
            start = piece.taken
            messages = piece.messages[start : start + room]
            sizes = [len(message.body) for message in messages]
            if max(sizes) > body_bytes_max or sum(sizes) > room_bytes:
                messages = messages[: _leading(sizes, body_bytes_max, room_bytes) or 1]
            at_once = not blobs and not self.in_flight
            if sizes[0] > body_bytes_max:
                self._refuse_next(queue, refuse_too_large(sizes[0], body_bytes_max))
                continue
            new = self._encode(queue, messages)
            if not new:
                continue
            fitting = _leading(list(map(len, new)), FRAME_BYTES, room_bytes)
            if not fitting:
                # A message larger than a frame or the window travels alone.
                if not (at_once or (not blobs and len(new[0]) > FRAME_BYTES and self._has_bytes_for(new[0]))):
                    break
                fitting = 1
            taken = new[:fitting]
            parts.append((piece, start, start + fitting))
            blobs += taken
            room -= fitting
            room_bytes -= sum(map(len, taken))
            self._taken(queue, fitting)
        if not blobs:
            return None
        frame = Frame(parts, blobs)
        self.in_flight += len(blobs)
        self.in_flight_bytes += frame.size
        return frame

    def release(self, frame: Frame) -> None:
        """Give the room of a frame back, once."""
        if not frame.given_up:
            frame.given_up = True
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
        if self._wanted or any(lane.pieces for lane in self.lanes.values()):
            self.want_no_more()

    def want_no_more(self) -> None:
        """Let everybody look for room again: there is more, or who waited for it does so no longer."""
        self._wanted = False
        self._ready()

    def _has_bytes_for(self, blob: bytes) -> bool:
        return self.in_flight_bytes + len(blob) <= UNANSWERED_BYTES_MAX

    def _encode(self, lane: Lane, messages: Sequence[Message]) -> list[bytes]:
        """Encode up to the first message that cannot be; if that is the very first, refuse it."""
        blobs: list[bytes] = []
        try:
            # A loop inside `try`, not a `try` in the loop; and the list keeps what was done before an error.
            blobs.extend(message.encoded() for message in messages)
        except (ValueError, KiteQError) as error:
            if not blobs:
                self._refuse_next(lane, error)
        return blobs

    def _refuse_next(self, lane: Lane, error: Exception) -> None:
        piece = lane.pieces[0]
        index = piece.taken
        self._taken(lane, 1)
        piece.fill(index, (error,))

    @staticmethod
    def _taken(lane: Lane, count: int) -> None:
        piece = lane.pieces[0]
        piece.taken += count
        lane.count -= count
        if piece.taken == len(piece.messages):
            lane.pieces.popleft()


def _leading(sizes: Sequence[int], size_max: int, sum_max: int) -> int:
    """Return how many of the first ones are each at most `size_max` and together at most `sum_max`."""
    total = 0
    for count, size in enumerate(sizes):
        total += size
        if size > size_max or total > sum_max:
            return count
    return len(sizes)
