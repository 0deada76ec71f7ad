"""The order of handlers is proved when the pipeline is made, and printed from the same list."""

from __future__ import annotations

from typing import Any

import pytest

from kiteq.errors import ConfigError
from kiteq.pipe.events import Checked, PacketsRead, Routed
from kiteq.pipe.pipeline import HANDLERS, Handler, Pipeline, describe, load_handlers

Kinds = tuple[type[Any], ...]


class FirstStep:
    accepts: Kinds = (PacketsRead,)
    emits: Kinds = (Checked,)

    def handle(self, event: Any) -> tuple[Any, ...]:
        return ()


class SecondStep:
    accepts: Kinds = (Checked,)
    emits: Kinds = ()

    def handle(self, event: Any) -> tuple[Any, ...]:
        return ()


class Nowhere(FirstStep):
    emits: Kinds = (Routed,)


def test_a_right_order_is_accepted() -> None:
    Pipeline([FirstStep(), SecondStep()])


def test_a_handler_before_what_it_needs_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="SecondStep accepts Checked, which no handler before it emits"):
        Pipeline([SecondStep(), FirstStep()])


def test_a_handler_whose_events_nobody_takes_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="Nowhere emits Routed, which no handler after it accepts"):
        Pipeline([Nowhere()])


@pytest.mark.parametrize("at", range(len(HANDLERS) - 1))
def test_no_essential_handler_can_be_left_out(at: int) -> None:
    handlers: list[Handler] = [object.__new__(make) for make in HANDLERS]
    Pipeline(handlers)
    left_out = HANDLERS[at].__name__
    if left_out in {"Respond", "Deliver", "Settle", "Bind", "Administer"}:
        return  # the ends of the pipeline stand side by side
    with pytest.raises(ConfigError):
        Pipeline(handlers[:at] + handlers[at + 1 :])


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("no_such_module:X", "cannot be loaded"),
        ("kiteq.limits:NoSuchClass", "cannot be loaded"),
        ("tests.pipe.test_pipeline:BeforeNothing", "wants to be before 'nothing'"),
    ],
)
def test_a_users_handler_that_cannot_be_placed_is_refused_by_name(path: str, text: str) -> None:
    class Core:
        def __getattr__(self, name: str) -> Any:
            return None

    with pytest.raises(ConfigError, match=text):
        load_handlers(Core(), [path])  # type: ignore[arg-type]


class BeforeNothing(SecondStep):
    before = "nothing"


def test_the_printed_pipeline_names_every_handler_in_order() -> None:
    printed = [line.split()[0] for line in describe().splitlines() if not line.startswith(" ")]
    assert printed == [handler.__name__.lower() for handler in HANDLERS]
