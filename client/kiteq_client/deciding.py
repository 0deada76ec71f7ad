"""Decisions on their way to one broker.

Theory of operation. What several tasks decide in the same moment leaves in one packet. A decision stays
here until the broker has answered it for good: it is sent again after a reconnect, when the broker asks,
when there was no answer for long, and, after temporary refusals, with growing pauses. Whether somebody
still waits for it makes no difference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Final, NamedTuple

from kiteq.errors import KiteQError, Refused, RemoteProtocolError, refusal
from kiteq.remoting.packets import Decide, Decided
from kiteq_client.decision import CODES, Decision

__all__ = ["Deciding", "Verdict"]

logger = logging.getLogger("kiteq_client")

TOKENS_MAX: Final = 1_024
"""Transactions decided by one packet."""
PAUSE_SECONDS_MIN: Final = 0.1
PAUSE_SECONDS_MAX: Final = 5.0
"""How long temporarily refused decisions wait, from the one to the other."""


class Verdict:
    """One decision about one transaction, and what the broker says to it.

    token: as the wire names the transaction. broker: its name; "" for whichever is at the address.
    deadline: when the caller stops waiting. finish: called when answered or late, None when nobody waits.
    quiet: it may be about a transaction that the broker never got.
    error: the broker's refusal, once `answered`.
    """

    __slots__ = ("answered", "broker", "deadline", "decision", "error", "finish", "id", "queued", "quiet", "token")

    def __init__(
        self,
        token: bytes,
        decision: Decision,
        broker: str,
        *,
        deadline: float = 0.0,
        finish: Callable[[], None] | None = None,
        quiet: bool = False,
    ) -> None:
        self.id = token[:16]
        self.token = token
        self.decision = decision
        self.broker = broker
        self.deadline = deadline
        self.finish = finish
        self.quiet = quiet
        self.answered = False
        self.queued = False
        self.error: KiteQError | None = None


class _Frame(NamedTuple):
    """The decisions of one packet; none for answers that decide nothing."""

    verdicts: list[Verdict]
    sent_at: float


class Deciding:
    """The decisions for one broker that it has not answered.

    wake: called when there is something to send. settled: called with each decision answered for good.
    timeout: seconds until what was not answered is sent again.
    """

    def __init__(self, wake: Callable[[], None], settled: Callable[[Verdict], None], timeout: float) -> None:
        self.broker = ""
        self._timeout = timeout
        self.pending: dict[bytes, Verdict] = {}
        self._wake = wake
        self._settled = settled
        self._waiting: list[Verdict] = []
        self._notes: dict[Decision, list[bytes]] = {}
        self._later: list[Verdict] = []
        self._frames: dict[int, _Frame] = {}
        self._pause_s = PAUSE_SECONDS_MIN
        self._again_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether something waits to be sent here, or for an answer that is on its way."""
        return (
            bool(self._notes)
            or any(self._is_here(verdict) for verdict in self._waiting)
            or any(not verdict.answered for frame in self._frames.values() for verdict in frame.verdicts)
        )

    def is_late(self, before: float) -> bool:
        """Whether the oldest packet was sent before that time."""
        for frame in self._frames.values():
            return frame.sent_at < before
        return False

    def submit(self, verdict: Verdict) -> None:
        """Send a decision until it is answered."""
        self.pending[verdict.id] = verdict
        self._queue(verdict)

    def again(self, verdict: Verdict, token: bytes) -> None:
        """Send a decision again: the broker has asked, so it does not have it."""
        verdict.token = token
        self._queue(verdict)

    def note(self, decision: Decision, token: bytes) -> None:
        """Answer a check with what decides nothing; nobody waits for that, and it is not repeated."""
        self._notes.setdefault(decision, []).append(token)
        self._wake()

    def drop(self, id: bytes) -> None:
        """Forget the decision about a transaction."""
        if (verdict := self.pending.pop(id, None)) is not None:
            verdict.answered = True

    def _is_here(self, verdict: Verdict) -> bool:
        """Whether the broker at the address is the one that knows of it."""
        return not verdict.broker or verdict.broker == self.broker

    def _send_again(self, frame: _Frame) -> None:
        for verdict in frame.verdicts:
            # One that went to the broker that asked for it is not ours any more.
            if not verdict.answered and not verdict.queued and self._is_here(verdict):
                verdict.queued = True
                self._waiting.append(verdict)

    def _queue(self, verdict: Verdict) -> None:
        if not verdict.queued:
            verdict.queued = True
            self._waiting.append(verdict)
            self._wake()

    # --- the connection ------------------------------------------------------------------------
    def connected(self, broker: str) -> None:
        """Begin a connection with the broker of this name: what it has not answered is sent again."""
        self.broker = broker
        self._notes.clear()
        frames, self._frames = self._frames, {}
        waiting, self._waiting = self._later + self._waiting, []
        self._later = []
        for frame in frames.values():
            self._send_again(frame)
        self._waiting += waiting
        self._pause_s = PAUSE_SECONDS_MIN

    def take(self, next_request: Callable[[], int]) -> list[Decide]:
        """Return packets with all that waits."""
        if not self._waiting and not self._notes:
            return []
        packets: list[Decide] = []
        waiting, self._waiting = self._waiting, []
        now = monotonic()
        frames: dict[Decision, list[Verdict]] = {}
        for verdict in waiting:
            if verdict.answered:
                continue
            if self._is_here(verdict):
                verdict.queued = False
                frames.setdefault(verdict.decision, []).append(verdict)
            else:
                self._waiting.append(verdict)
        for decision, verdicts in frames.items():
            for start in range(0, len(verdicts), TOKENS_MAX):
                frame = verdicts[start : start + TOKENS_MAX]
                self._frames[request := next_request()] = _Frame(frame, now)
                packets.append(Decide(request, CODES[decision], [verdict.token for verdict in frame]))
        notes, self._notes = self._notes, {}
        for decision, tokens in notes.items():
            for start in range(0, len(tokens), TOKENS_MAX):
                self._frames[request := next_request()] = _Frame([], now)
                packets.append(Decide(request, CODES[decision], tokens[start : start + TOKENS_MAX]))
        return packets

    def answer(self, packet: Decided) -> None:
        """Settle the decisions of a packet. Raises `RemoteProtocolError` if the answer does not fit it."""
        frame = self._frames.get(packet.request)
        if frame is None:
            logger.debug("%s answered decisions that were sent again meanwhile", self.broker)
            return
        verdicts = frame.verdicts
        exceptions = {item[0]: item for item in packet.exceptions}
        if exceptions and verdicts and max(exceptions) >= len(verdicts):
            raise RemoteProtocolError(f"the answer to {len(verdicts)} decisions speaks of others")
        del self._frames[packet.request]
        if not exceptions:
            self._pause_s = PAUSE_SECONDS_MIN
            for verdict in verdicts:
                self._end(verdict, None)
            return
        for index, verdict in enumerate(verdicts):
            if (item := exceptions.get(index)) is None:
                self._end(verdict, None)
            else:
                self._refused(verdict, refusal(item[1], item[2], item[3]))

    def refuse(self, request: int, error: Refused) -> bool:
        """Note that a whole packet was refused; return False if there is no such packet."""
        frame = self._frames.pop(request, None)
        if frame is None:
            return False
        for verdict in frame.verdicts:
            self._refused(verdict, error)
        return True

    def retry(self, now: float) -> None:
        """Send again, if it is time, what was refused temporarily or not answered."""
        for request, frame in list(self._frames.items()):
            if now < frame.sent_at + self._timeout:
                break
            del self._frames[request]
            self._send_again(frame)
            self._wake()
        if self._later and now >= self._again_at:
            later, self._later = self._later, []
            self._pause_s = min(2 * self._pause_s, PAUSE_SECONDS_MAX)
            self._waiting += later
            self._wake()

    def _refused(self, verdict: Verdict, error: Refused) -> None:
        if not error.temporary:
            self._end(verdict, error)
        elif not verdict.answered and not verdict.queued:
            if not self._later:
                self._again_at = monotonic() + self._pause_s
            verdict.queued = True
            self._later.append(verdict)

    def _end(self, verdict: Verdict, error: KiteQError | None) -> None:
        if verdict.answered:
            return
        verdict.answered = True
        verdict.error = error
        if self.pending.get(verdict.id) is verdict:
            del self.pending[verdict.id]
        self._settled(verdict)
        if verdict.finish is not None:
            verdict.finish()
