"""Puts checks into frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kiteq.remoting.packets import Ask

if TYPE_CHECKING:
    from kiteq.pipe.peer import Peer

__all__ = ["send_questions"]

ASK_BYTES_MAX: Final = 512 * 1024
"""One frame of questions is cut at this size, unless a single message is larger."""


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
