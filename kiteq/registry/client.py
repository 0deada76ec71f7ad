"""A client of kazoo with what kazoo lacks: it tells when it has ended, what was agreed on, and gives up a login.

Written against kazoo 2.11, of which it wraps two private methods; the tests notice when they change.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

from kazoo.client import KazooClient
from kazoo.exceptions import AuthFailedError
from kazoo.handlers.threading import SequentialThreadingHandler
from kazoo.protocol.serialization import SASL

from kiteq.registry_address import Credentials, RegistryAddress

__all__ = ["kazoo_log", "new_client"]

RECONNECT_SECONDS_MAX: Final = 1.0
"""Between kazoo's attempts; its own default grows to an hour."""
LOGIN_STEPS_MAX: Final = 8
"""SASL digest takes three; a server that tolerates a failed login makes kazoo repeat the last one for ever."""

kazoo_log: Final = logging.getLogger("kiteq.registry.kazoo")
kazoo_log.setLevel(logging.CRITICAL)  # what matters is told by our own log; set it lower to see kazoo's side too


class _Handler(SequentialThreadingHandler):  # type: ignore[misc]  # kazoo has no types
    """Tells when the thread of the connection has ended, which otherwise only prints a traceback."""

    def __init__(self, ended: Callable[[object, BaseException | None], None]) -> None:
        super().__init__()
        self._ended = ended

    def spawn(self, func: Callable[..., object], *args: object, **kwargs: object) -> threading.Thread:
        if getattr(func, "__name__", "") != "zk_loop":
            return super().spawn(func, *args, **kwargs)  # type: ignore[no-any-return]  # a Thread

        def run() -> None:
            problem: BaseException | None = None
            try:
                func(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 the end of the thread is what matters; it is told
                problem = error
            self._ended(self, problem)

        return super().spawn(run)  # type: ignore[no-any-return]  # a Thread


def new_client(
    address: RegistryAddress,
    credentials: Credentials | None,
    session_timeout: float,
    agreed: Callable[[float], None],
    ended: Callable[[object, BaseException | None], None],
) -> KazooClient:
    """Return a client that is not started.

    agreed: gets the session timeout of each connection, in seconds. ended: gets the client's handler, and
    the error if there is one, when it will not connect any more. Both are called in kazoo's thread.
    """
    options = None
    if credentials is not None:
        options = {"mechanism": "DIGEST-MD5", "username": credentials.user, "password": credentials.password}
    client = KazooClient(
        ",".join(address.hosts),
        timeout=session_timeout,
        handler=_Handler(ended),
        sasl_options=options,
        connection_retry={"max_tries": -1, "delay": 0.05, "max_delay": RECONNECT_SECONDS_MAX},
        logger=kazoo_log,
    )
    _watch_over(client._connection, agreed)  # noqa: SLF001 there is no public way
    return client


def _watch_over(connection: Any, agreed: Callable[[float], None]) -> None:
    connect, submit = connection._connect, connection._submit  # noqa: SLF001 there is no public way
    login_steps = 0

    def connect_and_tell(*arguments: object) -> Any:
        nonlocal login_steps
        login_steps = 0
        read_timeout, connect_timeout = connect(*arguments)
        agreed(read_timeout * 1.5 / 1000)
        return read_timeout, connect_timeout

    def submit_with_a_limit(request: Any, *arguments: object) -> None:
        nonlocal login_steps
        if isinstance(request, SASL):
            login_steps += 1
            if login_steps > LOGIN_STEPS_MAX:
                raise AuthFailedError
        submit(request, *arguments)

    connection._connect, connection._submit = connect_and_tell, submit_with_a_limit  # noqa: SLF001 see above
