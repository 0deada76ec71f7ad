"""Whether a store was made and never used, as a start that fails leaves it."""

from __future__ import annotations

from pathlib import Path

import lmdb

from kiteq.store.recovery import META_NUMBERS
from kiteq.store.tables import Table

__all__ = ["is_untouched"]


def is_untouched(folder: Path) -> bool:
    """Return whether the store in a folder can be read, and has never had a topic, so neither message nor group.

    Nothing is locked or changed.
    """
    try:
        with lmdb.open(str(folder), max_dbs=len(Table), readonly=True, lock=False, create=False) as environment:
            meta = environment.open_db(Table.META.name.lower().encode(), create=False)
            with environment.begin(db=meta) as transaction:
                return transaction.get(META_NUMBERS) is None
    except lmdb.Error:
        return False
