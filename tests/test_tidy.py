"""The style of the source as a test: levels of imports, sizes, and what must not be in a tracked file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
FUNCTION_LINES_MAX: Final = 70
MODULE_LINES_MAX: Final = 400
CONSTRUCTOR_POSITIONAL_MAX: Final = 6

LEVELS: Final = {
    "kiteq": 0,
    "kiteq.errors": 0,
    "kiteq.limits": 0,
    "kiteq.clock": 0,
    "kiteq.ids": 0,
    "kiteq.message": 0,
    "kiteq.times": 0,
    "kiteq.config": 0,
    "kiteq.values": 0,
    "kiteq.logs": 0,
    "kiteq.registry_address": 0,
    "kiteq.remoting": 1,
    "kiteq.binding": 1,
    "kiteq.registry": 1,
    "kiteq.store": 1,
    "kiteq.pipe": 2,
    "kiteq.recovery": 3,
    "kiteq.checking": 3,
    "kiteq.delaying": 3,
    "kiteq.clustering": 3,
    "kiteq.broker": 4,
    "kiteq.workers": 4,
    "kiteq.cli": 5,
    "kiteq.admin": 5,
    "kiteq.__main__": 5,
}
CLIENT_MAY_IMPORT: Final = {
    "kiteq",
    "kiteq.errors",
    "kiteq.limits",
    "kiteq.clock",
    "kiteq.message",
    "kiteq.remoting",
    "kiteq.remoting.packets",
    "kiteq.remoting.codec",
    "kiteq.binding",
    "kiteq.binding.bindings",
    "kiteq.registry",
    "kiteq.registry.directory",
    "kiteq.registry.errors",
    "kiteq.registry.layout",
    "kiteq.registry.log",
    "kiteq.registry.servers",
    "kiteq.registry_address",
}
CLIENT_MUST_NOT_LOAD: Final = (
    "lmdb",
    "typer",
    "structlog",
    "kazoo",
    "re2",
    "trio",
    "kiteq.config",
    "kiteq.logs",
    "kiteq.registry",
    "kiteq.store",
    "kiteq.pipe",
)

# A class of one letter each, so that this file does not contain what it forbids.
NOTES_FOR_LATER: Final = re.compile(r"\b(?:[T]ODO|[F]IXME|[X]XX|[H]ACK)\b")
OF_ONE_MACHINE: Final = re.compile(
    r"(?<![\w.$}])/(?:[w]ork|[r]oot|[h]ome/\w+)(?=[/\s\"'`:)]|$)"
    r"|[p]ypi\.org|[p]ythonhosted\.org|--(?:extra-)?[i]ndex-url|--[f]ind-links"
)


@cache
def tracked_files() -> tuple[Path, ...]:
    """Return the files that are, or would be, in a commit."""
    listing = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = (ROOT / name for name in listing.split("\0") if name)
    return tuple(sorted(path for path in paths if path.is_file() and not path.is_symlink()))


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place(path: Path, node: ast.stmt | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno if node else 1}"


def assert_none(found: list[str]) -> None:
    """Fail with one line for each finding."""
    assert not found, "\n" + "\n".join(found)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "client":
        del parts[0]
    if parts[-1] == "__init__":
        del parts[-1]
    return ".".join(parts)


def imports(path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Yield each import of a file with the module it names: `from kiteq import errors` names kiteq.errors."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                is_module = (ROOT / below.replace(".", "/")).is_dir() or (
                    ROOT / f"{below.replace('.', '/')}.py"
                ).is_file()
                yield node, below if is_module else node.module


def unit(module: str) -> str:
    """Return the entry of `LEVELS` that a module of kiteq belongs to."""
    return ".".join(module.split(".")[:2])


def source_files(*folders: str) -> list[Path]:
    return [path for path in python_files() if path.relative_to(ROOT).parts[0] in folders]


def test_every_module_of_kiteq_has_a_level() -> None:
    assert {unit(module_name(path)) for path in source_files("kiteq")} <= LEVELS.keys()


def test_imports_point_to_the_same_level_or_down() -> None:
    upward = []
    for path in source_files("kiteq"):
        level = LEVELS[unit(module_name(path))]
        for node, module in imports(path):
            if module.split(".")[0] == "kiteq_client" and level < LEVELS["kiteq.cli"]:
                upward.append(f"{place(path, node)} imports the client")
            elif module.split(".")[0] == "kiteq" and LEVELS[unit(module)] > level:
                upward.append(f"{place(path, node)} (level {level}) imports {module} (level {LEVELS[unit(module)]})")
    assert_none(upward)


def test_packages_of_one_level_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in source_files("kiteq"):
        importer = unit(module_name(path))
        imported = {unit(module) for _, module in imports(path) if module.split(".")[0] == "kiteq"}
        graph.setdefault(importer, set()).update(imported - {importer, "kiteq"})
    TopologicalSorter(graph).prepare()


def test_the_client_imports_only_what_it_shares_with_the_broker() -> None:
    wrong = [
        f"{place(path, node)} imports {module}"
        for path in source_files("client")
        for node, module in imports(path)
        if module.split(".")[0] == "kiteq" and module not in CLIENT_MAY_IMPORT
    ]
    assert_none(wrong)


def test_using_the_client_under_asyncio_loads_nothing_of_the_broker() -> None:
    # Nothing listens on port 1, so entering goes as far as a connection attempt and ends.
    program = f"""
import asyncio, sys
async def main():
    import kiteq_client
    for name in kiteq_client.__all__:
        getattr(kiteq_client, name)
    try:
        async with kiteq_client.Client("kiteq://127.0.0.1:1", group="lean", timeout=0.2):
            pass
    except kiteq_client.NotConnected:
        print([name for name in {CLIENT_MUST_NOT_LOAD!r} if name in sys.modules])
asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "client")))}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_a_broker_that_is_alone_and_a_set_of_workers_load_nothing_of_zookeeper_and_of_the_client() -> None:
    program = """
import sys
import kiteq.broker, kiteq.workers.member, kiteq.workers.supervisor
print([name for name in ("kazoo", "anyio", "kiteq_client") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_every_module_says_what_it_is() -> None:
    assert_none([place(path) for path in python_files() if tree(path).body and ast.get_docstring(tree(path)) is None])


def test_modules_have_at_most_400_lines() -> None:
    sizes = ((path, len(path.read_text().splitlines())) for path in python_files())
    assert_none([f"{place(path)} has {size} lines" for path, size in sizes if size > MODULE_LINES_MAX])


def test_functions_have_at_most_70_lines() -> None:
    too_long = []
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                size = node.end_lineno - node.lineno + 1
                if size > FUNCTION_LINES_MAX:
                    too_long.append(f"{place(path, node)} {node.name} has {size} lines")
    assert_none(too_long)


def test_constructors_have_at_most_6_positional_parameters() -> None:
    too_many = []
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                count = len(node.args.posonlyargs) + len(node.args.args) - 1
                if count > CONSTRUCTOR_POSITIONAL_MAX:
                    too_many.append(f"{place(path, node)} takes {count}")
    assert_none(too_many)


@pytest.mark.parametrize(
    "pattern",
    [pytest.param(NOTES_FOR_LATER, id="notes-for-later"), pytest.param(OF_ONE_MACHINE, id="of-one-machine")],
)
def test_no_tracked_file_contains(pattern: re.Pattern[str]) -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        for number, line in enumerate(text.splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert_none(found)
