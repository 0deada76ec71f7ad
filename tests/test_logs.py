"""Logging: where events go and what they look like."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from kiteq import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_a_pipe_gets_one_json_object_per_event() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    structlog.get_logger().info("client connected", group="g", id=b"\x01")
    event = json.loads(stream.getvalue())
    assert event.pop("timestamp").endswith("Z")
    assert event == {"event": "client connected", "level": "info", "group": "g", "id": "b'\\x01'"}


def test_a_terminal_gets_readable_lines() -> None:
    stream = Terminal()
    logs.configure(stream=stream)
    structlog.get_logger().warning("client connected", group="g")
    assert "client connected" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_the_format_can_be_chosen() -> None:
    stream = Terminal()
    logs.configure(format="json", stream=stream)
    structlog.get_logger().info("x")
    assert stream.getvalue().startswith("{")
    stream = Terminal()
    piped = io.StringIO()
    logs.configure(format="console", stream=piped)
    structlog.get_logger().info("x")
    assert not piped.getvalue().startswith("{")


def test_events_under_the_level_are_dropped() -> None:
    stream = io.StringIO()
    logs.configure("warning", stream=stream)
    structlog.get_logger().info("x")
    assert stream.getvalue() == ""


def test_a_traceback_shows_no_local_variables() -> None:
    stream = Terminal()
    logs.configure(stream=stream)
    secret = "hunter" + "2"
    try:
        raise ValueError(len(secret))
    except ValueError:
        structlog.get_logger().exception("failed")
    assert "ValueError" in stream.getvalue()
    assert "hunter2" not in stream.getvalue()
