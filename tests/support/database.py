"""What the database servers of the tests have in common: a folder, a user without rights, a process, an end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.support.broker import free_port

__all__ = ["DatabaseFailed", "DatabaseServer", "program"]

READY_SECONDS_MAX: Final = 60.0
STOP_SECONDS_MAX: Final = 30.0
POLL_SECONDS: Final = 0.02


class DatabaseFailed(AssertionError):
    """The server did not start as it should; the text ends with its log."""


def program(name: str, *folders: str) -> str:
    """Return the path of a program of the system, which Debian may keep away from PATH."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))
    if found is None:
        raise DatabaseFailed(f"{name} is not installed; scripts/test installs what the tests need")
    return found


class DatabaseServer:
    """One server on a free port, with its data in a new folder that is deleted at the end.

    user: of the system; servers refuse to run as root, so then they run as this one, or as nobody.
    """

    stop_signal = signal.SIGTERM

    def __init__(self, user: str) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="kiteq-test-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._user: str | None = None
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self._user = user if user in names else "nobody"
            entry = pwd.getpwnam(self._user)
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)

    def initialise(self) -> None:
        """Make the data folder."""
        raise NotImplementedError

    def command(self) -> Sequence[str]:
        """Return the command line of the server."""
        raise NotImplementedError

    def try_connect(self) -> None:
        """Connect; raise whatever the driver raises while the server is not ready."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """The process id of the server."""
        assert self._process is not None
        return self._process.pid

    def run(self, command: Sequence[str]) -> None:
        """Run a program as the server's user."""
        result = subprocess.run(
            command, cwd=self.folder, user=self._user, capture_output=True, text=True, timeout=120, check=False
        )
        if result.returncode != 0:
            raise DatabaseFailed(f"{command[0]} ended with {result.returncode}:\n{result.stdout}{result.stderr}")

    def start(self) -> None:
        """Start the server and return when it takes connections."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                cwd=self.folder,
                user=self._user,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + READY_SECONDS_MAX
        while True:
            if self._process.poll() is not None:
                raise DatabaseFailed(f"the server ended with {self._process.returncode}; its log:\n{self.log()}")
            try:
                self.try_connect()
            except Exception as error:
                if time.monotonic() > deadline:
                    raise DatabaseFailed(f"no server at port {self.port}: {error}; its log:\n{self.log()}") from error
                time.sleep(POLL_SECONDS)
            else:
                return

    def log(self) -> str:
        """Return what the server has printed."""
        return (self.folder / "log").read_text(errors="replace")

    def close(self) -> None:
        """End the server and delete its data."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(self.stop_signal)
            try:
                process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS_MAX)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.initialise()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
