"""Transactions against a model, over virtual time."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import TransactionMachine


@pytest.mark.slow
def test_a_broker_does_with_transactions_what_the_model_says() -> None:
    run_state_machine_as_test(
        TransactionMachine, settings=settings(max_examples=200, stateful_step_count=50, derandomize=True, database=None)
    )


@pytest.mark.long
def test_a_broker_does_with_transactions_what_the_model_says_for_many_long_stories() -> None:
    run_state_machine_as_test(TransactionMachine, settings=settings(max_examples=5_000, stateful_step_count=120))
