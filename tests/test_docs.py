"""What the pages name exists: tests, files, links, settings; and code shown is code tested."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from kiteq.cli.version import version_text
from kiteq.config import Settings
from kiteq.pipe.pipeline import HANDLERS

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = sorted([ROOT / "README.md", *(ROOT / "doc").glob("*.md"), ROOT / "benchmark" / "README.md"])
TEST_NAME: Final = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK: Final = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
SOURCE_FILE: Final = re.compile(r"`((?:kiteq|client|tests|benchmark|scripts|doc|examples)/[\w./]+)`")


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return the names of the tests of a file, without importing it."""
    if not path.exists():
        return frozenset()
    nodes = ast.walk(ast.parse(path.read_text()))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def found(pattern: re.Pattern[str]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    for page in PAGES:
        for match in pattern.finditer(page.read_text()):
            yield page, match.groups()


def test_every_test_that_a_page_names_exists() -> None:
    named = list(found(TEST_NAME))
    assert len(named) > 20
    assert [f"{page.name}: {path}::{name}" for page, (path, name) in named if name not in names_in(ROOT / path)] == []


def test_every_promise_names_a_test_or_says_that_nothing_is_promised() -> None:
    page = (ROOT / "doc" / "guarantees.md").read_text()
    promises = page.partition("## Promises")[2].partition("## What is not promised")[0].split("\n### ")[1:]
    unproved = [promise.splitlines()[0] for promise in promises if TEST_NAME.search(promise) is None]
    assert unproved == []


def test_every_link_leads_to_a_file() -> None:
    local = [(page, target) for page, (target,) in found(LINK) if "://" not in target]
    assert [f"{page.name}: {target}" for page, target in local if not (page.parent / target).exists()] == []


def test_every_source_file_that_a_page_names_exists() -> None:
    assert [f"{page.name}: {path}" for page, (path,) in found(SOURCE_FILE) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_is_described(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "doc" / "operating.md").read_text()


def test_the_versions_are_those_that_are_printed() -> None:
    assert f"```\n{version_text()}\n```" in (ROOT / "doc" / "operating.md").read_text()


def test_the_handlers_are_described_in_order() -> None:
    table = (ROOT / "doc" / "architecture.md").read_text().partition("| handler | does |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [handler.__name__.lower() for handler in HANDLERS]


def test_the_handler_of_the_page_is_the_tested_example() -> None:
    example = (ROOT / "examples" / "drop_type.py").read_text()
    assert f"```python\n{example}```" in (ROOT / "doc" / "architecture.md").read_text()
