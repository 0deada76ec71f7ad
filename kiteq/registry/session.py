"""A session with ZooKeeper that comes back by itself.

Theory of operation. kazoo runs threads of its own; they only note what happened and ring a bell.
Everything else is called by the one thread of the keeper.

What kazoo does not do by itself, and is done here:
- After a refused login, and after some errors, its thread ends for good: a new client is made.
- It tells of an expired session only after it has reached ZooKeeper again: here a session counts as over
  when its time has passed since the connection was lost.
- It says CONNECTED before the login is through, and also when that fails: `prove` finds out.
- It greets with the last transaction it has seen, and a server that has seen less, because it was wiped,
  hangs up on it for ever. Once the session must be over it greets as one that has seen nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from kazoo import exceptions as kazoo_errors
from kazoo.client import KazooClient
from kazoo.handlers.threading import KazooTimeoutError
from kazoo.protocol.states import KazooState, KeeperState
from kazoo.security import CREATOR_ALL_ACL, OPEN_ACL_UNSAFE

from kiteq.registry.client import kazoo_log, new_client
from kiteq.registry.errors import CredentialsRefused, RegistryUnavailable
from kiteq.registry.layout import ROOT
from kiteq.registry_address import Credentials, RegistryAddress

__all__ = ["BadVersionError", "Connection", "NoNodeError", "NodeError", "NodeExistsError", "ZooKeeperSession"]

NoNodeError = kazoo_errors.NoNodeError
NodeExistsError = kazoo_errors.NodeExistsError
BadVersionError = kazoo_errors.BadVersionError
NodeError: Final = (NoNodeError, NodeExistsError, BadVersionError)
"""Answers about a node, which belong to whoever asked; all other errors are about the session."""

REFUSALS: Final = (
    kazoo_errors.NoAuthError,
    kazoo_errors.InvalidACLError,
    kazoo_errors.SessionClosedRequireSaslError,
)
REQUESTS_AT_ONCE: Final = 256
"""Requests on the way: enough to hide the round trip."""
RESTART_SECONDS: Final = 0.5
"""Between clients: one whose login is refused ends at once."""
CONNECT_SECONDS: Final = 1.0
"""How long a new client may take before that is worth telling."""
CALL_SECONDS_MIN: Final = 1.0
LOGINS_REFUSED_MAX: Final = 2
"""A login that fails once may have met a server that was just going down: it says the same."""


@dataclass(frozen=True, slots=True)
class Connection:
    """Whether ZooKeeper can be reached. since: on the monotonic clock.

    session_over: our ephemeral nodes are gone, or will be before anybody could rely on them.
    reason: a sentence; "" while connected.
    """

    connected: bool
    since: float
    session_over: bool
    reason: str


class ZooKeeperSession:
    """One session after the other.

    ring: called in any thread when something has changed; it must not block.
    writes: whether the registry cannot be used without the right to write.
    connections: counts up; after each, whatever was watched must be read again.
    """

    def __init__(
        self,
        address: RegistryAddress,
        credentials: Credentials | None,
        session_timeout: float,
        ring: Callable[[], None],
        *,
        writes: bool,
    ) -> None:
        self.address = address
        self.connections = 0
        self.session_timeout = session_timeout
        self._writes = writes
        self._asked_timeout = session_timeout
        self._chroot = address.chroot  # kazoo's own way cannot create one
        self._credentials = credentials
        self.ring = ring
        self._client: KazooClient | None = None
        self._ended = False
        self._start_at = 0.0
        self._down_since: float | None = time.monotonic()
        self._up_since = 0.0
        self._logins_refused = 0
        self.acl = OPEN_ACL_UNSAFE if credentials is None else CREATOR_ALL_ACL

    # --- called by anybody ---------------------------------------------------------------------

    def connection(self) -> Connection:
        """Return whether ZooKeeper can be reached now."""
        since = self._down_since
        if since is None:
            return Connection(True, self._up_since, False, "")
        over = self.connections == 0 or time.monotonic() - since > self.session_timeout
        return Connection(False, since, over, f"no connection to {self.address} (is ZooKeeper running there?)")

    def seconds_until_over(self) -> float | None:
        """Return the time until the session counts as over, None if it does or there is a connection."""
        since = self._down_since
        if since is None or self.connections == 0:
            return None
        left = since + self.session_timeout - time.monotonic()
        return left if left > 0 else None

    # --- called by kazoo's threads: note and ring ----------------------------------------------

    def _changed(self, client: Any, state: str) -> None:
        if self._client is None or client is not self._client:
            return
        if state == KazooState.CONNECTED:
            self.connections += 1
            self._up_since = time.monotonic()
            self._down_since = None
        else:
            if self._down_since is None:
                self._down_since = time.monotonic()
            if client.client_state == KeeperState.AUTH_FAILED:
                self._logins_refused += 1
        self.ring()

    def _agreed(self, session_timeout: float) -> None:
        self.session_timeout = session_timeout

    def _thread_ended(self, handler: object, problem: BaseException | None) -> None:
        if self._client is None or self._client.handler is not handler:
            return
        if isinstance(problem, REFUSALS):
            self._logins_refused = LOGINS_REFUSED_MAX
        if self._down_since is None:
            self._down_since = time.monotonic()
        self._ended = True
        self.ring()

    # --- called by the keeper's thread ---------------------------------------------------------

    @property
    def session_id(self) -> int:
        """The id of the session, which ephemeral nodes have as their owner. Raises `RegistryUnavailable`."""
        identity = None if self._client is None else self._client.client_id
        if identity is None:
            raise RegistryUnavailable(f"no connection to {self.address}")
        return int(identity[0])

    def ensure(self) -> None:
        """Have a client that is connected, or tries to be. Raises `RegistryUnavailable` while it only tries."""
        if self._client is not None and self._ended:
            self.close()
        if self._client is None and time.monotonic() >= self._start_at:
            self._start()
        if self._client is None or not self._client.connected:
            self._fail()

    def _fail(self) -> NoReturn:
        connection = self.connection()
        if self._client is not None and connection.session_over:
            self._client.last_zxid = 0
        if self._logins_refused >= LOGINS_REFUSED_MAX:
            raise self._refused()
        raise RegistryUnavailable(connection.reason)

    def _refused(self) -> CredentialsRefused:
        if self._credentials is None:
            return CredentialsRefused(f"{self.address} wants a user and a password; give them in KITEQ_ZK_AUTH")
        return CredentialsRefused(f"{self.address} does not accept the user and password of KITEQ_ZK_AUTH")

    def _start(self) -> None:
        client = new_client(self.address, self._credentials, self._asked_timeout, self._agreed, self._thread_ended)
        self._ended = False
        self._start_at = time.monotonic() + RESTART_SECONDS
        self._client = client
        client.add_listener(lambda state: self._changed(client, state))
        client.start_async().wait(CONNECT_SECONDS)

    def close(self) -> None:
        """End the session: its ephemeral nodes go. May take as long as the session timeout."""
        client, self._client = self._client, None
        if client is None:
            return
        if self._down_since is None:
            self._down_since = time.monotonic()
        try:
            client.stop()
            client.close()
        except Exception as error:  # noqa: BLE001 whatever it is, this client is not used again
            kazoo_log.debug("a client did not stop well: %r", error)

    def call(self, name: str, *arguments: object, **options: object) -> Any:
        """Do one request, as `gather` does. Raises `NodeError`, `RegistryUnavailable`, `CredentialsRefused`."""
        (answer,) = self.gather(name, [arguments], **options)
        if isinstance(answer, NodeError):
            raise answer
        return answer

    def gather(self, name: str, requests: Iterable[tuple[Any, ...]], **options: object) -> list[Any]:
        """Do many requests of one kind; return their answers in order, a `NodeError` as a value.

        name: of a method of kazoo. requests: the arguments of each, the path first.

        Raises `RegistryUnavailable` and `CredentialsRefused`.
        """
        return self._gather(name, [(self._chroot + path, *rest) for path, *rest in requests], **options)

    def _gather(self, name: str, waiting: list[tuple[Any, ...]], **options: object) -> list[Any]:
        answers: list[Any] = []
        for start in range(0, len(waiting), REQUESTS_AT_ONCE):
            client = self._client
            if client is None or not client.connected:
                raise RegistryUnavailable(self.connection().reason or f"no connection to {self.address}")
            deadline = time.monotonic() + max(self.session_timeout, CALL_SECONDS_MIN)
            method = getattr(client, f"{name}_async")
            chunk = waiting[start : start + REQUESTS_AT_ONCE]
            results = [method(*arguments, **options) for arguments in chunk]
            for result in results:
                try:
                    answers.append(result.get(timeout=max(0.0, deadline - time.monotonic())))
                except NodeError as error:
                    answers.append(error)
                except (kazoo_errors.KazooException, KazooTimeoutError) as error:
                    raise self._translated(error, name) from error
        return answers

    def _translated(self, error: Exception, name: str) -> Exception:
        if isinstance(error, kazoo_errors.NoAuthError) and self._credentials is not None and not self._logins_refused:
            return CredentialsRefused(f"{self.address} does not let the user {self._credentials.user!r} in ({name})")
        if isinstance(error, REFUSALS) or self._logins_refused >= LOGINS_REFUSED_MAX:
            return self._refused()
        if isinstance(error, KazooTimeoutError):
            return RegistryUnavailable(f"{self.address} does not answer")
        return RegistryUnavailable(f"{self.address} failed: {type(error).__name__} ({name})")

    def prove(self) -> None:
        """Find out whether the login is through, and whether a broker may write. Raises `CredentialsRefused`."""
        self.catch_up()  # is answered after the login
        if self._credentials is not None and self._writes:
            self.make_folders([ROOT])
            path = self.call("create", f"{ROOT}/login-", b"", acl=self.acl, ephemeral=True, sequence=True)
            self.call("delete", path.removeprefix(self._chroot))
        self._logins_refused = 0

    def catch_up(self) -> None:
        """Have the server we talk to see all that was written before now."""
        self.call("sync", ROOT)

    def make_folders(self, paths: Iterable[str]) -> None:
        """Create persistent nodes and those above them, the chroot too, where they are missing."""
        self._make_folders([self._chroot + path for path in paths])

    def _make_folders(self, paths: list[str]) -> None:
        answers = self._gather("create", [(path, b"") for path in paths], acl=self.acl)
        missing = [path for path, answer in zip(paths, answers, strict=True) if isinstance(answer, NoNodeError)]
        if missing:
            self._make_folders(list({path.rpartition("/")[0] for path in missing}))
            self._make_folders(missing)

    def watch(self, note: Callable[[str], None]) -> Callable[[Any], None]:
        """Return what kazoo takes as a watch; `note` gets the path, in kazoo's thread, before the bell rings."""

        def fired(event: Any) -> None:
            if event.path:  # has none when the connection is lost; everything is read again then
                note(event.path.removeprefix(self._chroot))
                self.ring()

        return fired
