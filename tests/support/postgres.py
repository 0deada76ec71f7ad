"""Debian's PostgreSQL, started by the tests: `with PostgreSQL() as server: server.connect()`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

from tests.support.database import DatabaseServer, program

__all__ = ["PostgreSQL"]


def _program(name: str) -> str:
    # Debian keeps the programs of each version in a folder of its own.
    return program(name, *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True))


class PostgreSQL(DatabaseServer):
    """A server with one database and one user, both called kiteq, without a password.

    It flushes nothing: the tests crash its clients, never the machine.
    """

    stop_signal = signal.SIGINT
    """The fast way: it ends sessions and does not wait for them."""

    def __init__(self) -> None:
        super().__init__("postgres")

    def initialise(self) -> None:
        """Make the data folder, about 1 s."""
        self.run(
            [
                _program("initdb"),
                f"--pgdata={self.folder / 'data'}",
                "--username=kiteq",
                "--auth=trust",
                "--no-sync",
                "--no-locale",
                "--encoding=UTF8",
                "--no-instructions",
            ]
        )

    def command(self) -> Sequence[str]:
        """Return the command line of the server; small buffers, nothing flushed."""
        settings = {
            "port": self.port,
            "listen_addresses": self.host,
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            "shared_buffers": "32MB",
            "max_connections": 200,
            "autovacuum": "off",
            "jit": "off",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [_program("postgres"), "-D", str(self.folder / "data"), *options]

    def try_connect(self) -> None:
        """Connect, and make the database."""
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = 'kiteq'").fetchall():
                connection.execute("CREATE DATABASE kiteq")

    def connect(self, database: str = "kiteq", **options: Any) -> psycopg.Connection[Any]:
        """Return a connection of psycopg."""
        return psycopg.connect(self._dsn(database), **options)

    def url(self, driver: str, database: str = "kiteq") -> str:
        """Return the address for SQLAlchemy: driver is "postgresql+psycopg" or the like."""
        return f"{driver}://kiteq@{self.host}:{self.port}/{database}"

    def _dsn(self, database: str) -> str:
        return f"host={self.host} port={self.port} user=kiteq dbname={database}"
