"""Debian's MariaDB, started by the tests: `with MariaDB() as server: server.connect()`."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import pymysql

from tests.support.database import DatabaseServer, program

__all__ = ["MariaDB"]


class MariaDB(DatabaseServer):
    """A server with one database and one user, both called kiteq, without a password.

    It flushes nothing: the tests crash its clients, never the machine.
    """

    def __init__(self) -> None:
        super().__init__("mysql")

    def initialise(self) -> None:
        """Make the system tables, 0.8 s."""
        self.run(
            [
                program("mariadb-install-db"),
                "--no-defaults",
                f"--datadir={self.folder / 'data'}",
                f"--tmpdir={self.folder}",  # another one at the same time would delete our files in /tmp
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                "--skip-name-resolve",
            ]
        )

    def command(self) -> Sequence[str]:
        """Return the command line of the server; small buffers, nothing flushed."""
        return [
            program("mariadbd", "/usr/sbin"),
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            f"--tmpdir={self.folder}",
            f"--socket={self.folder / 'socket'}",
            f"--port={self.port}",
            f"--bind-address={self.host}",
            f"--pid-file={self.folder / 'pid'}",
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=8M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-flush-method=nosync",
            "--innodb-stats-persistent=0",
            "--skip-name-resolve",
            "--skip-log-bin",
            "--performance-schema=0",
            "--max-connections=400",
        ]

    def try_connect(self) -> None:
        """Connect as root, by the socket, and make the user."""
        # pymysql leaves the socket of a failed attempt open.
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self.folder / "socket"))
        root = pymysql.connect(unix_socket=str(self.folder / "socket"), user="root", ssl_disabled=True)
        with root, root.cursor() as cursor:
            cursor.execute("CREATE DATABASE IF NOT EXISTS kiteq")
            cursor.execute("CREATE USER IF NOT EXISTS kiteq@127.0.0.1")
            cursor.execute("GRANT ALL ON *.* TO kiteq@127.0.0.1")

    def connect(self, database: str = "kiteq", **options: Any) -> Any:
        """Return a connection of pymysql."""
        return pymysql.connect(
            host=self.host, port=self.port, user="kiteq", database=database, ssl_disabled=True, **options
        )

    def url(self, driver: str, database: str = "kiteq") -> str:
        """Return the address for SQLAlchemy: driver is "mysql+pymysql" or the like."""
        return f"{driver}://kiteq@{self.host}:{self.port}/{database}"
