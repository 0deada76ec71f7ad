"""Tables in an LMDB file: one folder, owned by one process.

LMDB is opened with sync and metasync and never with writemap (a full disk would be a SIGBUS). The
file is sparse: `map_size` is the store's limit, only used pages take disk. A truncated file would
be a SIGBUS too, so its size is compared with LMDB's own meta page before it is mapped.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

import lmdb

from kiteq.errors import StoreFailed, StoreFull, StoreUnusable
from kiteq.limits import PREALLOCATED_BYTES
from kiteq.store.tables import Row, Table, Usage

__all__ = ["LmdbTables"]

FILE_SYSTEMS: Final = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"})
"""Where mmap, flock and fsync are known to do what LMDB needs."""

DISK_FULL_BYTES: Final = 1 << 20
"""With less free than this a write may have been cut short."""
LMDB_MAGIC: Final = 0xBEEFC0DE
_META = struct.Struct("<16xI4x8x8xI92xQQ")
"""One LMDB meta page: magic, page size, last page used, transaction id."""


class LmdbTables:
    """One LMDB environment with a database per table.

    folder: made when missing. bytes_max: the most the file may grow to.
    force: open on a file system that is not known to be safe.
    Raises `StoreUnusable`.
    """

    def __init__(self, folder: Path, bytes_max: int, *, force: bool = False) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        self._reserve = folder / "reserve"
        _make_folder(folder)
        self._lock_fd = _lock_folder(folder)
        try:
            if not force:
                _check_file_system(folder)
            _check_file_size(folder / "data.mdb")
            self._env = lmdb.open(
                str(folder), map_size=bytes_max, max_dbs=len(Table), max_readers=64, sync=True, metasync=True,
                writemap=False, readahead=True, meminit=False, mode=0o600,
            )  # fmt: skip
            self._databases = [self._env.open_db(table.name.lower().encode()) for table in Table]
            self._env.reader_check()
            self._preallocate()
            _sync_folder(folder)
            _sync_folder(folder.parent)
        except lmdb.Error as error:
            os.close(self._lock_fd)
            raise StoreUnusable(f"the store in {folder} cannot be opened: {error}") from error
        except BaseException:
            os.close(self._lock_fd)
            raise
        self._page_bytes: int = self._env.stat()["psize"]

    def _preallocate(self) -> None:
        """Reserve disk blocks that are given up when the disk is full, so that acks go on."""
        if self._reserve.exists() and self._reserve.stat().st_size >= PREALLOCATED_BYTES:
            return
        with suppress(OSError), self._reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, PREALLOCATED_BYTES)

    def apply(self, rows: list[Row]) -> None:
        """Write rows in one synced transaction."""
        try:
            self._apply(rows)
        except lmdb.MapFullError as error:
            raise StoreFull(f"the store in {self._folder} has reached its limit of {self._bytes_max} bytes") from error
        except lmdb.Error as error:
            if self._is_no_space(error):
                self._reserve.unlink(missing_ok=True)
                raise StoreFull(f"the disk that holds {self._folder} is full") from error
            raise StoreFailed(f"writing to the store in {self._folder} failed: {error}") from error

    def _is_no_space(self, error: lmdb.Error) -> bool:
        """Tell a full disk from other I/O errors; py-lmdb puts the C library's text in the message.

        LMDB reports a write that the full disk cut short as an I/O error. Going on is safe even if it was
        another one: the pages of a failed transaction are referred to by nothing, and after a failed
        write of the page that would refer to them LMDB takes no transaction any more.
        """
        text = str(error)
        if os.strerror(errno.ENOSPC) in text or os.strerror(errno.EDQUOT) in text:
            return True
        return os.strerror(errno.EIO) in text and shutil.disk_usage(self._folder).free < DISK_FULL_BYTES

    def _apply(self, rows: list[Row]) -> None:
        databases = self._databases
        with self._env.begin(write=True) as transaction:
            put, delete = transaction.put, transaction.delete
            for table, key, value in rows:
                if value is None:
                    delete(key, db=databases[table])
                elif not put(key, value, db=databases[table]):
                    raise StoreFailed(f"the store in {self._folder} did not take a row of {table.name}")

    def get(self, table: Table, key: bytes) -> bytes | None:
        """Return the value of a key."""
        with self._env.begin() as transaction:
            value: bytes | None = transaction.get(key, db=self._databases[table])
            return value

    def scan(
        self, table: Table, start: bytes, end: bytes, *, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Return rows with start <= key < end in order."""
        found: list[tuple[bytes, bytes]] = []
        size = 0
        with self._env.begin() as transaction, transaction.cursor(self._databases[table]) as cursor:
            if cursor.set_range(start):
                for key, value in cursor:
                    if key >= end:
                        break
                    found.append((key, value))
                    size += len(value)
                    if bytes_max is not None and size >= bytes_max:
                        break
        return found

    def usage(self) -> Usage:
        """Return how full the map is (free pages inside count as free) and the disk below it."""
        disk = shutil.disk_usage(self._folder)
        used = (self._env.info()["last_pgno"] + 1 - self._free_pages()) * self._page_bytes
        return Usage(used, self._bytes_max, disk.free, disk.total)

    def _free_pages(self) -> int:
        """Return the pages on LMDB's free list: what no table uses of the pages ever taken."""
        with self._env.begin() as transaction:
            stats = [self._env.stat(), *(transaction.stat(db) for db in self._databases)]
        in_use = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return max(0, int(self._env.info()["last_pgno"]) - 1 - int(in_use))

    def close(self) -> None:
        """Close the environment and let another process own the folder."""
        self._env.close()
        os.close(self._lock_fd)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreUnusable(f"the store's folder {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreUnusable(f"the store's folder {folder} is not writable for this user")


def _lock_folder(folder: Path) -> int:
    try:
        descriptor = os.open(folder / "kiteq.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnusable(f"the store's folder {folder} is not writable: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreUnusable(
            f"another broker owns the store's folder {folder}: stop it, or give this one a folder of its own with --db"
        ) from None
    return descriptor


def _check_file_system(folder: Path) -> None:
    kind = _file_system(folder.resolve())
    if kind not in FILE_SYSTEMS:
        raise StoreUnusable(
            f"the store's folder {folder} is on a {kind} file system, where LMDB may lose or damage messages; "
            "use a local disk, or add ?force=1 to --db to take that risk"
        )


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds a path, from the longest mount point above it."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, this_kind, *_ = line.split(" ")
        mount = mount.encode().decode("unicode_escape")
        if len(mount) >= len(best) and path.is_relative_to(mount):
            best, kind = mount, this_kind
    return kind


def _check_file_size(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_META.size)
        if len(first) < _META.size:
            raise StoreUnusable(f"{path} is cut short: {size} bytes; restore it from a copy")
        magic, page_bytes, last_page, transaction = _META.unpack(first)
        file.seek(page_bytes)
        second = file.read(_META.size)
    if magic != LMDB_MAGIC:
        raise StoreUnusable(f"{path} is not an LMDB file")
    if len(second) == _META.size:
        _, _, other_page, other_transaction = _META.unpack(second)
        if other_transaction > transaction:
            last_page = other_page
    if size < (last_page + 1) * page_bytes:
        raise StoreUnusable(
            f"{path} is cut short: {size} bytes where {(last_page + 1) * page_bytes} are in use; restore it from a copy"
        )


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; LMDB does not."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
