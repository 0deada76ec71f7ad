"""Whether a store was made and never used, as a start that fails leaves it."""

from __future__ import annotations

from pathlib import Path

import lmdb

from kiteq.store.recovery import META_NUMBERS
from kiteq.store.tables import Table

__all__ = ["is_untouched"]


def is_untouched(folder: Path) -> bool:
    """Return whether the store in a folder can be read, and never had a topic, a delayed or a half message.

    Nothing is locked or changed.
    """
    try:
        with lmdb.open(str(folder), max_dbs=len(Table), readonly=True, lock=False, create=False) as environment:
            tables = {table: environment.open_db(table.name.lower().encode(), create=False) for table in Table}
            with environment.begin() as transaction:
                if transaction.get(META_NUMBERS, db=tables.pop(Table.META)) is not None:
                    return False
                return all(transaction.stat(one)["entries"] == 0 for one in tables.values())
    except lmdb.Error:
        return False
