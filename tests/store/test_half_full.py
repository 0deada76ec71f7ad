"""A store above the share kept for acks: what adds messages is refused, all else goes on."""

from __future__ import annotations

from kiteq.errors import StoreFull
from kiteq.store.tables import Table, Usage
from tests.store.reopening import KeptTables, OpenStore


class FullTables(KeptTables):
    def usage(self) -> Usage:
        usage = super().usage()
        return usage._replace(used=usage.limit * 9 // 10)


def test_acks_and_decisions_go_on_after_a_message_was_refused() -> None:
    opened = OpenStore(FullTables())
    opened.store.writer._ack_try_seconds = 0.0
    prepared = opened.submission()
    prepared.refusable = True
    prepared.rows.append((Table.HALF, b"1", b"x" * 100))
    opened.commit(prepared)
    for _ in range(30):
        decided = opened.submission()
        decided.rows.append((Table.HALF, b"0", None))
        opened.commit(decided)
    assert isinstance(opened.outcomes[0], StoreFull)
    assert opened.outcomes[1:] == [None] * 30
