"""What each worker of a set runs with, and which of them a store still needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from kiteq.config import Settings
from kiteq.errors import ConfigError
from kiteq.store.untouched import is_untouched
from kiteq.values import folder_of, split_address

__all__ = ["check_left_over", "known_to_clients", "settings_of", "with_ports"]

_WORKER_FOLDER: Final = re.compile(r"worker-([1-9][0-9]{0,8})", re.ASCII)
_STORE_FILE: Final = "data.mdb"
WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 compared, not bound


def settings_of(settings: Settings) -> list[Settings]:
    """Return the settings of each worker, the first with the ports and the folder that are given."""
    return [
        replace(
            settings,
            workers=1,
            bind=_later(settings.bind, number),
            advertise=None if settings.advertise is None else _later(settings.advertise, number),
            pport=_later_port(settings.pport, number),
            db=_folder_url(settings.db, number),
        )
        for number in range(settings.workers)
    ]


def check_left_over(settings: Settings) -> None:
    """Raise `ConfigError` when the store has messages of a worker that would not run with these settings."""
    folder = folder_of(settings.db)
    if folder is None:
        return
    left = sorted(number for number in _worker_folders(folder) if number >= settings.workers)
    if left:
        first, last = left[0], left[-1]
        raise ConfigError(
            f"the folder {folder / f'worker-{first}'} holds what waits at worker {first}, which does not run with "
            f"workers {settings.workers}: start with --workers {last + 1}; to have fewer, wait until nothing waits at "
            f"the workers from {first} on (`kiteq group list --broker` at their ports), stop, and delete their folders"
        )


def known_to_clients(settings: Settings, address: str) -> str:
    """Return the address by which clients are told of a worker: ":PORT" is the host they have connected to.

    address: HOST:PORT it listens on. With a registry it is for who names a worker, as commands on its machine do: the
    others find the advertised address there.
    """
    if settings.advertise is not None and settings.zkhost is None:
        return settings.advertise
    host, port = split_address(address)
    return f":{port}" if host in WILDCARDS else address


def with_ports(settings: Settings, address: str, http: str | None) -> Settings:
    """Return the settings with the ports that a worker has got, so that it is found there again."""
    bind = f"{settings.bind.rpartition(':')[0]}:{split_address(address)[1]}"
    return replace(settings, bind=bind, pport=http)


def _worker_folders(folder: Path) -> Iterator[int]:
    """Return the numbers of the workers that have something; more were started once and never came to serve."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        match = _WORKER_FOLDER.fullmatch(entry.name)
        if match is not None and (entry / _STORE_FILE).exists() and not is_untouched(entry):
            yield int(match[1])


def _later(address: str, number: int) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + number}" if int(port) else address


def _later_port(pport: str | None, number: int) -> str | None:
    if pport is None or ":" in pport:
        return None if pport is None else _later(pport, number)
    return str(int(pport) + number) if int(pport) else pport


def _folder_url(url: str, number: int) -> str:
    if number == 0 or folder_of(url) is None:
        return url
    path, mark, query = url.partition("?")
    return f"{path.rstrip('/')}/worker-{number}{mark}{query}"
