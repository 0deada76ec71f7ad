"""What a client is asked about a transaction, and in which frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from kiteq.pipe.settlement import head_of
from kiteq.remoting.packets import Ask

if TYPE_CHECKING:
    from kiteq.pipe.peer import Peer
    from kiteq.store.half_reading import HalfRead

__all__ = ["NO_QUESTION", "Question", "question_of", "send_questions"]

ASK_BYTES_MAX: Final = 512 * 1024
"""One frame of questions is cut at this size, unless a single message is larger."""


class Question(NamedTuple):
    """The first message of a transaction, None when it cannot be read, and the topics of all."""

    first: bytes | None
    topics: frozenset[str]


NO_QUESTION: Final = Question(None, frozenset())


def question_of(half: HalfRead) -> Question:
    """Return what is asked about a transaction; the other messages of it are not kept."""
    heads = [head_of(blob) for blob in half.blobs if blob is not None]
    return Question(half.blobs[0], frozenset([head.topic for head in heads if head is not None]))


def send_questions(peer: Peer, questions: list[tuple[int, bytes, bytes]]) -> None:
    """Ask one client, in frames of a bounded size; `questions`: (attempt, token, first message) each."""
    start = size = 0
    for position, (_, _, blob) in enumerate(questions):
        if position > start and size + len(blob) > ASK_BYTES_MAX:
            _send_one(peer, questions[start:position])
            start, size = position, 0
        size += len(blob)
    _send_one(peer, questions[start:])


def _send_one(peer: Peer, questions: list[tuple[int, bytes, bytes]]) -> None:
    attempts, tokens, blobs = zip(*questions, strict=True)
    peer.send(Ask(0, list(attempts), list(tokens), list(blobs)))
