"""A network of its own for processes of a test, in which the test can cut lines.

    with Network() as network:
        network.inside(broker.start)            # the broker runs in it, listening on 127.0.0.11
        with network.cut(to="127.0.0.11"):      # nothing arrives there; what it sends still goes out
            ...

It is a Linux network namespace with the loopback interface alone, on which all addresses 127.x.y.z exist:
parties that are to be told apart get addresses of their own. Its ports are nobody else's, and it goes away
with the last process in it. Lines are cut as by a broken cable: packets are dropped, nobody is told.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, Self, TypeVar

from tests.support.database import program

__all__ = ["Network", "NetworkFailed"]

CLONE_NEWNET: Final = 0x40000000
COMMAND_SECONDS_MAX: Final = 30.0
SYSTEM_FOLDERS: Final = ("/usr/sbin", "/sbin")

RULES: Final = """
table inet kiteq_test {
    set unreachable { type ipv4_addr; }
    set silent { type ipv4_addr; }
    chain input {
        type filter hook input priority 0;
        ip daddr @unreachable drop
        ip saddr @silent drop
    }
}
"""

T = TypeVar("T")


class NetworkFailed(AssertionError):
    """The system does not let this process make networks, or refuses a rule."""


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise NetworkFailed(f"{name}: {os.strerror(number)}; networks for tests need root with all its capabilities")


class Network:
    """One network; it exists while the block runs, and while processes in it do."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def __enter__(self) -> Self:
        self._handle = _in_thread(_new_namespace)
        try:
            self._command("ip", "link", "set", "lo", "up")
            self._command("nft", "-f", "-", text=RULES)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def inside(self, call: Callable[[], T]) -> T:
        """Return what `call` does in this network: the sockets it opens and the processes it starts belong here.

        It runs in a thread of its own, which ends with it: no other code is ever moved to this network.
        """
        handle = self._handle
        assert handle is not None, "the network does not exist"

        def enter_and_call() -> T:
            _call("setns", handle, CLONE_NEWNET)
            return call()

        return _in_thread(enter_and_call)

    def add_host(self, address: str) -> None:
        """Give this network an address that is none of loopback: who connects to it comes from it."""
        self._command("ip", "address", "add", f"{address}/32", "dev", "lo")

    @contextmanager
    def cut(self, *, to: str = "", answers_of: str = "") -> Iterator[None]:
        """Drop what is sent to one address, or what is sent from one, until the block ends.

        Give both, with the same address, for a line that is cut in both directions.
        """
        cuts = [(name, address) for name, address in (("unreachable", to), ("silent", answers_of)) if address]
        assert cuts, "name an address"
        for name, address in cuts:
            self._change("add", name, address)
        try:
            yield
        finally:
            for name, address in cuts:
                self._change("delete", name, address)

    def _change(self, verb: str, name: str, address: str) -> None:
        self._command("nft", verb, "element", "inet", "kiteq_test", name, f"{{ {address} }}")

    def _command(self, name: str, *arguments: str, text: str | None = None) -> None:
        command = [program(name, *SYSTEM_FOLDERS), *arguments]

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command, input=text, timeout=COMMAND_SECONDS_MAX, check=False, capture_output=True, text=True
            )

        if (done := self.inside(run)).returncode:
            raise NetworkFailed(f"{' '.join(command)}: {done.stderr}")

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _new_namespace() -> int:
    """Return a handle of a new network; the thread that calls this belongs to it from now on."""
    _call("unshare", CLONE_NEWNET)
    return os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _in_thread(call: Callable[[], T]) -> T:
    """Return what `call` returns in a new thread, or raise what it raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 raised again below, where somebody waits for it
            errors.append(error)

    thread = threading.Thread(target=run, name="in-a-network")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
