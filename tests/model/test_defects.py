"""The model notices seeded defects; the last ones are defects that it, or its author, found in the broker."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from kiteq.pipe.checks import Checks
from kiteq.pipe.delays import frame_of
from kiteq.pipe.events import Batch, HalfFrame
from kiteq.pipe.preparing import Preparing
from kiteq.pipe.transactions import Transactions
from kiteq.store import half_recovery
from kiteq.store.halves import Halves, State
from kiteq.store.store import Store
from tests.model.machine import TransactionMachine

Patch = pytest.MonkeyPatch


def any_group_decides(patch: Patch) -> None:
    take = Halves.take
    patch.setattr(Halves, "take", lambda self, tokens, _group: take(self, tokens, None))


def a_parked_transaction_counts_as_decided(patch: Patch) -> None:
    take = Halves.take

    def only_open(self: Halves, tokens: Sequence[bytes], group: int | None) -> Any:
        places, ids, slots, others = take(self, tokens, group)
        unknowns = [self.unknowns[slot] for slot in slots]
        for slot, count in zip(slots, unknowns, strict=True):
            if count >= 2:
                self.state[slot] = State.PARKED
        return places, ids, slots, others

    patch.setattr(Halves, "take", only_open)


def a_refused_decision_is_not_undone(patch: Patch) -> None:
    patch.setattr(Halves, "undo", lambda _self, _slots: None)


def a_used_slot_keeps_its_questions(patch: Patch) -> None:
    restore = Halves.restore

    def keep(self: Halves, ids: Sequence[bytes], *arguments: Any, **more: Any) -> list[int]:
        before = bytes(self.asks)
        slots = restore(self, ids, *arguments, **more)
        for slot in slots:
            self.asks[slot] = before[slot] if slot < len(before) else 0
        return slots

    patch.setattr(Halves, "restore", keep)


def a_decision_is_answered_before_it_is_durable(patch: Patch) -> None:
    take_decision = Transactions._take_decision

    def answer(self: Transactions, request: Any, taken: Any) -> None:
        take_decision(self, request, taken)
        done, request.done = request.done, lambda _exceptions: None
        done([])

    patch.setattr(Transactions, "_take_decision", answer)


def somebody_of_another_group_is_asked(patch: Patch) -> None:
    def anybody(self: Checks, _slot: int, _read: Any) -> Any:
        return random.choice(sorted(self._core.peers, key=lambda peer: peer.name))

    patch.setattr(Checks, "_other_member", anybody)


def others_are_asked_at_once(patch: Patch) -> None:
    patch.setattr(Checks, "_others_from", lambda _self, _slot: 0.0)


def the_last_check_rolls_back(patch: Patch) -> None:
    def drop(self: Checks, slot: int, transaction_id: bytes) -> None:
        self._core.transactions.decide([transaction_id], lambda _: None, commit=False, group=None, by="limit")

    patch.setattr(Checks, "_park", drop)


def running_uses_up_the_budget(patch: Patch) -> None:
    answered = Checks.answered
    patch.setattr(Checks, "answered", lambda self, peer, _answer, tokens: answered(self, peer, 2, tokens))


def a_commit_forgets_its_last_message(patch: Patch) -> None:
    messages = Halves.messages

    def cut(self: Halves, slots: Sequence[int]) -> list[list[bytes]] | None:
        found = messages(self, slots)
        return None if found is None else [one[:-1] or one for one in found]

    patch.setattr(Halves, "messages", cut)


def a_half_message_is_delivered(patch: Patch) -> None:
    prepared = Preparing._prepared

    def deliver(self: Preparing, peer: Any, frames: list[HalfFrame], *more: Any) -> None:
        prepared(self, peer, frames, *more)
        for frame in frames:
            if frame.blobs:
                self._core.place(Batch(None, [frame_of(self._core, frame.blobs)], 0, done=lambda _error: None))

    patch.setattr(Preparing, "_prepared", deliver)


def a_restart_forgets_added_messages(patch: Patch) -> None:
    patch.setattr(half_recovery, "_restore_parts", lambda *_arguments: None)


def a_restart_forgets_what_was_asked(patch: Patch) -> None:
    patch.setattr(half_recovery._Checks, "of", lambda _self, _handle: None)


def a_row_of_which_one_is_left_is_not_rewritten(patch: Patch) -> None:
    restore = Halves.restore

    def forget(self: Halves, ids: Sequence[bytes], handles: Sequence[int], row: int, **more: Any) -> list[int]:
        slots = restore(self, ids, handles, row, **more)
        if len(ids) == 1:
            self._live.pop(row, None)
        return slots

    patch.setattr(Halves, "restore", forget)


def messages_on_their_way_to_the_disk_are_not_waited_for(patch: Patch) -> None:
    async def at_once(_store: Store) -> None:
        await trio.lowlevel.checkpoint()

    patch.setattr(Store, "all_durable", at_once)


DEFECTS: tuple[Callable[[Patch], None], ...] = (
    any_group_decides,
    a_parked_transaction_counts_as_decided,
    a_refused_decision_is_not_undone,
    a_used_slot_keeps_its_questions,
    a_decision_is_answered_before_it_is_durable,
    somebody_of_another_group_is_asked,
    others_are_asked_at_once,
    the_last_check_rolls_back,
    running_uses_up_the_budget,
    a_commit_forgets_its_last_message,
    a_half_message_is_delivered,
    a_restart_forgets_added_messages,
    a_restart_forgets_what_was_asked,
    a_row_of_which_one_is_left_is_not_rewritten,
    messages_on_their_way_to_the_disk_are_not_waited_for,
)


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_noticed(defect: Callable[[Patch], None], monkeypatch: Patch) -> None:
    defect(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 an assertion of the model, or a crash of the broker
        run_state_machine_as_test(
            TransactionMachine,
            settings=settings(
                max_examples=400,
                stateful_step_count=50,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
