"""What all tests share: the broker fixture, the hypothesis profile, and the rule that CI skips nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.broker import BrokerProcess

# Several test processes share few cores: a slow example says nothing about the code.
settings.register_profile("kiteq", deadline=None, max_examples=50)
settings.register_profile("kiteq-ci", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("kiteq-ci" if os.environ.get("CI") == "true" else "kiteq")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    with BrokerProcess(tmp_path) as process:
        yield process


def _skipped(config: pytest.Config) -> int:
    """Return how many skipped tests count as failures: all of them in CI, none elsewhere."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") != "true" or reporter is None:
        return 0
    return len(reporter.stats.get("skipped", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count = _skipped(terminalreporter.config)
    if count:
        terminalreporter.write_line(f"{count} skipped: in CI a skipped test is a failure", red=True)
