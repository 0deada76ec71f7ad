"""These tests make networks, which only root may."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _may_make_networks() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes networks for tests")
