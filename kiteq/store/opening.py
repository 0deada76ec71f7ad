"""From a database URL to a store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from kiteq.errors import ConfigError
from kiteq.store.lmdb import LmdbTables
from kiteq.store.memory import MemoryTables
from kiteq.store.store import Store

__all__ = ["folder_of", "open_store"]

FOLDER_SCHEMES = ("lmdb", "mmap", "file")


def folder_of(url: str) -> Path | None:
    """Return the folder of an `lmdb:`, `mmap:` or `file:` URL, None for another kind.

    `lmdb:///var/lib/kiteq` is absolute, `lmdb://./data` and `lmdb://data` are relative.
    """
    parts = urlsplit(url)
    return Path(parts.netloc + parts.path) if parts.scheme in FOLDER_SCHEMES else None


def open_store(url: str, *, bytes_max: int) -> Store:
    """Open the store a URL names. Raises `ConfigError` for a bad URL, `StoreUnusable` for a bad store."""
    parts = urlsplit(url)
    folder = folder_of(url)
    if folder is not None:
        if str(folder) in ("", "."):
            raise ConfigError(f"the database URL {url!r} names no folder; say for example lmdb://./kiteq-data")
        force = parse_qs(parts.query).get("force") == ["1"]
        tables = LmdbTables(folder, bytes_max, force=force)
        try:
            return Store(tables)
        except BaseException:
            tables.close()
            raise
    if parts.scheme in ("memory", "mock"):
        return Store(MemoryTables(bytes_max), durable=False, forgets=parts.scheme == "mock")
    raise ConfigError(
        f"the database URL {url!r} is of no known kind; use lmdb:///absolute/path, lmdb://./relative/path or memory://"
    )
