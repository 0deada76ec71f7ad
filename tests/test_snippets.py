"""Every Python snippet of README.md and the pages about the client, run against a real broker.

A snippet that names 127.0.0.1:13800 gets the address of a broker of its own. `await` at the top level
is allowed, as in `python -m asyncio`. An HTML comment right above the fence changes how it is run:

    <!-- snippet: with client -->        inside `async with Client(...) as client:`
    <!-- snippet: until TEXT -->         it serves: once it has printed TEXT it gets SIGTERM and must end well
    <!-- snippet: skip-run REASON -->    only compiled
"""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.support.broker import BrokerProcess

ROOT: Final = Path(__file__).resolve().parent.parent
DOCUMENTS: Final = ("README.md", "doc/client.md", "doc/blocking.md", "doc/marker.md")
DOCUMENTED_ADDRESS: Final = "127.0.0.1:13800"
RUN_SECONDS_MAX: Final = 30.0

FENCE: Final = re.compile(
    r"(?:^<!-- snippet: (?P<marker>.*?) -->\n+)?^```python\n(?P<source>.*?)^```$", re.MULTILINE | re.DOTALL
)
WITH_CLIENT: Final = """\
from kiteq_client import *
async with Client("kiteq://127.0.0.1:13800", group="snippets", topics=["trade"]) as client:
"""
# Runs a file whose top level may await.
DRIVER: Final = """
import ast, asyncio, inspect, sys
path = sys.argv[1]
with open(path) as file:
    code = compile(file.read(), path, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
result = eval(code, {"__name__": "__main__", "__file__": path})
if inspect.iscoroutine(result):
    asyncio.run(result)
"""


class Snippet(NamedTuple):
    place: str
    marker: str
    source: str


def snippets() -> Iterator[Snippet]:
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text() if path.exists() else ""
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("source")) + 1
            yield Snippet(f"{name}:{line}", match["marker"] or "", match["source"])


def program_of(snippet: Snippet, address: str) -> str:
    """Return the whole program of a snippet."""
    source = snippet.source
    if snippet.marker == "with client":
        source = WITH_CLIENT + textwrap.indent(source, "    ")
    return source.replace(DOCUMENTED_ADDRESS, address)


def run_to_end(path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, path],
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS_MAX,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def run_until(path: Path, text: str) -> None:
    """Run a program that serves; end it by SIGTERM when it has printed `text`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", DRIVER, path],
        cwd=path.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(RUN_SECONDS_MAX, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if text in line:
                process.send_signal(signal.SIGTERM)
        assert text in output, output
        assert process.wait() == 0, output
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_no_python_fence_of_the_documents_is_overlooked() -> None:
    fences = sum((ROOT / name).read_text().count("```python") for name in DOCUMENTS if (ROOT / name).exists())
    assert len(list(snippets())) == fences


def test_no_marker_is_misspelt() -> None:
    known = re.compile(r"with client|until \S.*|skip-run \S.*|")
    assert [snippet.place for snippet in snippets() if known.fullmatch(snippet.marker) is None] == []


@pytest.mark.parametrize("snippet", [pytest.param(snippet, id=snippet.place) for snippet in snippets()])
def test_snippet_compiles(snippet: Snippet) -> None:
    program = program_of(snippet, DOCUMENTED_ADDRESS)
    compile(program, snippet.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet",
    [pytest.param(snippet, id=snippet.place) for snippet in snippets() if not snippet.marker.startswith("skip-run")],
)
def test_snippet_runs(snippet: Snippet, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    program = program_of(snippet, DOCUMENTED_ADDRESS)
    if DOCUMENTED_ADDRESS in program:
        broker: BrokerProcess = request.getfixturevalue("broker")
        program = program_of(snippet, broker.address)
    path = tmp_path / "snippet.py"
    path.write_text(program)
    if snippet.marker.startswith("until "):
        run_until(path, snippet.marker.removeprefix("until "))
    else:
        run_to_end(path)
