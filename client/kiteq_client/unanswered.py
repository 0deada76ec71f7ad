"""Messages that were sent to one broker and that it has not answered, so that they can be sent again."""

from __future__ import annotations

from time import monotonic

from kiteq.errors import Refused, RemoteProtocolError, SendTimeout, refusal
from kiteq.message import Message, Receipt
from kiteq.remoting.packets import RECEIPT_DELAYED, RECEIPT_DUPLICATE, Receipts
from kiteq_client.outgoing import Frame, Outgoing, Result

__all__ = ["DRAINING", "Unanswered"]

DRAINING = "draining"
"""The code by which a broker that shuts down refuses messages: it has stored nothing of them."""

_new_tuple = tuple.__new__


class Unanswered:
    """The frames sent to one broker that it has not answered, in order of sending.

    `count` messages of `size` bytes, also those nobody waits for any more.
    """

    def __init__(self, outgoing: Outgoing, timeout: float) -> None:
        self.frames: dict[int, Frame] = {}
        self.count = 0
        self.size = 0
        self._kept: dict[int, Frame] = {}
        self._outgoing = outgoing
        self._timeout = timeout

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for an answer that is on its way."""
        return any(frame.is_wanted() for frame in self.frames.values())

    @property
    def is_open(self) -> bool:
        """Whether somebody waits for an answer."""
        return self.is_awaited or any(frame.is_wanted() for frame in self._kept.values())

    def is_late(self, before: float) -> bool:
        """Whether the oldest frame was sent before that time."""
        for frame in self.frames.values():
            return frame.sent_at < before
        return False

    def add(self, request: int, frame: Frame) -> None:
        """Note that a frame is sent as this request."""
        frame.request = request
        frame.sent_at = monotonic()
        self.frames[request] = frame
        self.count += len(frame.blobs)
        self.size += frame.size

    def again(self) -> list[Frame]:
        """Return what a new connection has to send again: not what nobody waits for, which may be old."""
        self.give_up(connected=False)
        now = monotonic()
        self.frames = {**self._kept, **self.frames}
        self._kept = {}
        for frame in self.frames.values():
            frame.resent = True
            frame.sent_at = now
        return list(self.frames.values())

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
        self._release(frame)
        exceptions = {item[0]: item for item in receipts.exceptions}
        at = 0
        for piece, start, stop in frame.parts:
            messages = piece.messages[start:stop]
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
            piece.submission.deadline = now + self._timeout
            piece.fill(start, results)
        return count

    def refuse(self, request: int, error: Exception) -> bool:
        """Fail every message of a frame; return False if there is no such frame.

        What a broker that shuts down refuses is sent to any broker, or, if this one may have it from a
        connection before, to this one when it is back.
        """
        frame = self.frames.pop(request, None)
        if frame is None:
            return False
        if isinstance(error, Refused) and error.code == DRAINING:
            if frame.resent:
                self._kept[request] = frame
                return True
            self._release(frame)
            self._outgoing.submit_again(frame)
            return True
        if frame.resent and isinstance(error, Refused):
            # It may have been stored before, when its answer was lost.
            error = SendTimeout(
                f"{error}, when it was sent again: whether it is stored is unknown; "
                "send this message again, at worst it comes twice"
            )
        self._release(frame)
        if isinstance(error, Refused):
            frame.given_to("")
        for piece, start, stop in frame.parts:
            piece.fill(start, [error] * (stop - start))
        return True

    def refuse_all(self, error: Exception) -> None:
        """Fail every message here."""
        self.frames = {**self._kept, **self.frames}
        self._kept = {}
        for request in list(self.frames):
            self.refuse(request, error)

    def give_up(self, *, connected: bool) -> None:
        """Let others have the room of frames nobody waits for any more; without a connection forget them too."""
        for frames in (self.frames, self._kept):
            for request, frame in list(frames.items()):
                if not frame.is_wanted():
                    if connected:
                        self._outgoing.release(frame)
                    else:
                        del frames[request]
                        self._release(frame)

    def _release(self, frame: Frame) -> None:
        self.count -= len(frame.blobs)
        self.size -= frame.size
        self._outgoing.release(frame)


def _exceptional(item: list[object], message: Message, broker: str, *, durable: bool) -> Result:
    _, code, reason, temporary = item[:4]
    if code in (RECEIPT_DUPLICATE, RECEIPT_DELAYED):
        return Receipt(message.id, broker, None, duplicate=code == RECEIPT_DUPLICATE, durable=durable)
    message.given_to = ""  # it is not there: whoever can may take it next time
    return refusal(str(code), str(reason), bool(temporary))
