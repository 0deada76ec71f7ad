"""A changed copy of the package, for a broker process to run from: with a defect, or in a hurry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import kiteq

__all__ = ["PACKAGE_PARENT", "hurried_copy", "patched_copy"]

PACKAGE_PARENT: Final = Path(kiteq.__file__).parent.parent
HURRIED: Final = (
    ("kiteq/limits.py", "SNAPSHOT_SECONDS", "0.2"),
    ("kiteq/limits.py", "READY_BYTES_MAX", "16 * KIB"),
    ("kiteq/limits.py", "RECORD_BYTES_MAX", "16 * KIB"),
    ("kiteq/limits.py", "READ_BYTES", "8 * KIB"),
    ("kiteq/limits.py", "RETRY_ROWS_MAX", "4"),
    ("kiteq/limits.py", "DUPLICATE_IDS_MAX", "4_000"),
    ("kiteq/recovery.py", "SWEEP_SECONDS", "0.2"),
    ("kiteq/recovery.py", "REWRITE_AGE_SECONDS", "0.2"),
    ("kiteq/checking.py", "TIDY_SECONDS", "0.2"),
    ("kiteq/limits.py", "HALF_CACHE_BYTES_MAX", "4 * KIB"),
)
"""Small bounds and short periods: backlogs are read from the log, old records are rewritten all the time."""


def _copy(folder: Path, *packages: str) -> Path:
    parent = folder / "changed"
    for package in packages or ("kiteq",):
        shutil.copytree(PACKAGE_PARENT / package, parent / package, ignore=shutil.ignore_patterns("__pycache__"))
    return parent


def hurried_copy(folder: Path, constants: Iterable[tuple[str, str, str]] = HURRIED) -> Path:
    """Return the folder, for PYTHONPATH, that holds a copy of the package with other constants."""
    parent = _copy(folder)
    for name, constant, value in constants:
        path = parent / name
        text, changed = re.subn(rf"(?m)^{constant}: Final = .*$", f"{constant}: Final = {value}", path.read_text())
        assert changed == 1, f"{name} does not define {constant} as before: bring {__file__} up to date"
        path.write_text(text)
    return parent


def patched_copy(folder: Path, patch: Path, *packages: str) -> Path:
    """Return the folder, for PYTHONPATH, that holds a patched copy of the package, or of the packages named."""
    parent = _copy(folder, *packages)
    applied = subprocess.run(
        ["git", "apply", "--recount", "-C1", "-p1", str(patch)],
        cwd=parent,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder), "GIT_DIR": str(folder / "none")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert applied.returncode == 0, (
        f"{patch.name} does not apply any more: the code it changes has moved. "
        f"Bring {patch.relative_to(PACKAGE_PARENT)} up to date.\n{applied.stderr}"
    )
    return parent
