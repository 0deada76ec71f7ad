"""From a database URL to a store."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from kiteq.errors import ConfigError
from kiteq.store.lmdb import LmdbTables
from kiteq.store.memory import MemoryTables
from kiteq.store.store import Store
from kiteq.values import folder_of

__all__ = ["open_store"]


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
