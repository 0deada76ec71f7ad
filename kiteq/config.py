"""Settings of a broker: flags over environment (`KITEQ_*`) over TOML over defaults, checked as one."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from kiteq import limits
from kiteq.errors import ConfigError
from kiteq.values import READERS, Given, WrongValue, is_loopback, seconds_text, size_text, split_address

__all__ = ["NOT_BUILT", "NotBuilt", "Resolved", "Settings", "load", "split_address"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a broker runs with; `load` makes checked ones.

    bind: HOST:PORT to listen on, port 0 for any free one. advertise: HOST:PORT to announce instead.
    pport: PORT (at the host of `bind`) or HOST:PORT of the HTTP port, None for none.
    topics: topics served, empty for any name. zkhost: `zk://` URL of the registry, None for the embedded one.
    workers: broker processes; every limit is of each of them. db: URL of the store. flush: when a receipt is given.
    `store_limit`, `disk_free_min`, `message_limit` and `group_quota` are bytes; times are seconds.
    disk_free_min: below this much free disk publishing is refused, None for `limits.DISK_FREE_BYTES_MIN` and its share.
    check_limit: answers "unknown" before a transaction is parked. half_quota: open transactions of one group.
    handlers: "module:Class" of own pipeline handlers. insecure: allow other machines in without users.
    """

    bind: str = "127.0.0.1:13800"
    advertise: str | None = None
    pport: str | None = None
    topics: tuple[str, ...] = ()
    zkhost: str | None = None
    zk_timeout: float = limits.ZK_SESSION_SECONDS
    workers: int = 1
    db: str = "lmdb://./kiteq-data"
    flush: Literal["sync", "async"] = "sync"
    store_limit: int = limits.STORE_BYTES_MAX_DEFAULT
    disk_free_min: int | None = None
    message_limit: int = limits.BODY_BYTES_MAX_DEFAULT
    group_quota: int = limits.GROUP_QUOTA_BYTES_DEFAULT
    connections: int = limits.CONNECTIONS_MAX_DEFAULT
    ack_deadline: float = limits.ACK_DEADLINE_SECONDS
    max_hold: float = limits.HOLD_SECONDS_MAX
    drain_timeout: float = limits.DRAIN_SECONDS
    check_after: float = limits.CHECK_AFTER_SECONDS
    check_limit: int = limits.CHECK_LIMIT
    checks_per_second: int = limits.CHECKS_PER_SECOND
    check_elsewhere_after: float = limits.CHECK_ELSEWHERE_SECONDS
    half_quota: int = limits.HALF_QUOTA
    half_age_alarm: float = limits.HALF_AGE_ALARM_SECONDS
    handlers: tuple[str, ...] = ()
    insecure: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"

    @property
    def http_address(self) -> str | None:
        """HOST:PORT of the HTTP port, None when there is none."""
        if self.pport is None or ":" in self.pport:
            return self.pport
        return f"{self.bind.rpartition(':')[0]}:{self.pport}"


class Resolved(NamedTuple):
    """Checked settings, and where each value came from.

    misspelt: environment variables that look like a setting but are none: `(variable, nearest)` each.
    """

    settings: Settings
    sources: Mapping[str, str]
    misspelt: tuple[tuple[str, str], ...]


class NotBuilt(ConfigError):
    """A setting whose feature this version does not have yet."""


NOT_BUILT: Final[Mapping[str, str]] = {
    "users": "users and their rights",
}
"""Names that are kept for later, with the feature they stand for."""

WILDCARDS: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 compared, not bound
ENVIRONMENT_PREFIX: Final = "KITEQ_"
DEFAULT_SOURCE: Final = "default"
MESSAGES_IN_STORE_MIN: Final = 4


def load(flags: Mapping[str, object], environ: Mapping[str, str], config_path: Path | None = None) -> Resolved:
    """Return the settings these sources give. Raises `ConfigError`.

    flags: by name of the field; `None` means not given. environ: only `KITEQ_*` is looked at.
    config_path: a TOML file; when it is `None`, `KITEQ_CONFIG` may name one.
    """
    if config_path is None and "KITEQ_CONFIG" in environ:
        if not environ["KITEQ_CONFIG"]:
            raise ConfigError("KITEQ_CONFIG is empty; name a TOML file or leave it out")
        config_path = Path(environ["KITEQ_CONFIG"])
    given: dict[str, Given] = {} if config_path is None else _from_toml(config_path)
    for name in (*READERS, *NOT_BUILT):
        variable = ENVIRONMENT_PREFIX + name.upper()
        if variable in environ:
            given[name] = Given(environ[variable], variable, is_toml=False)
    for name, value in flags.items():
        if value is not None:
            given[name] = Given(value, f"--{name.replace('_', '-')}", is_toml=False)
    values = {name: _read(name, item) for name, item in given.items()}
    sources = {field.name: given[field.name].source if field.name in given else DEFAULT_SOURCE for field in _FIELDS}
    if "group_quota" not in values:
        store_limit = values.get("store_limit", limits.STORE_BYTES_MAX_DEFAULT)
        values["group_quota"] = min(limits.GROUP_QUOTA_BYTES_DEFAULT, store_limit)
    settings = Settings(**values)
    _check_together(settings, sources)
    return Resolved(settings, sources, _misspelt(environ))


_FIELDS: Final = fields(Settings)


def _read(name: str, given: Given) -> Any:
    if name in NOT_BUILT:
        raise NotBuilt(f"{name} ({given.source}): {NOT_BUILT[name]}: not built yet; leave it out")
    reader = READERS.get(name)
    if reader is None:
        raise ConfigError(f"{given.source}: unknown setting {name!r}{_nearest(name)}")
    shown = repr(given.value)
    if isinstance(given.value, str | list | tuple) and not given.value:
        shown = "empty"
    elif len(shown) > 100:
        shown = shown[:97] + "..."
    try:
        if shown == "empty":
            reader(given._replace(value=None))
        return reader(given)
    except WrongValue as error:
        if name == "db" and "@" in shown:
            shown = "a URL with a user"  # it may hold a password
        raise ConfigError(f"{name} is {shown} ({given.source}); it must be {error}") from None


def _check_together(settings: Settings, sources: Mapping[str, str]) -> None:
    def told(name: str, value: str) -> str:
        return f"{name} is {value} ({sources[name]})"

    if settings.max_hold < settings.ack_deadline:
        raise ConfigError(
            f"{told('max_hold', seconds_text(settings.max_hold))}; it must be at least ack_deadline, "
            f"which is {seconds_text(settings.ack_deadline)} ({sources['ack_deadline']})"
        )
    store = f"{size_text(settings.store_limit)} ({sources['store_limit']})"
    if settings.message_limit * MESSAGES_IN_STORE_MIN > settings.store_limit:
        raise ConfigError(
            f"{told('message_limit', size_text(settings.message_limit))}; it must be at most a quarter of "
            f"store_limit, which is {store}"
        )
    if settings.group_quota > settings.store_limit:
        raise ConfigError(
            f"{told('group_quota', size_text(settings.group_quota))}; it must be at most store_limit, which is {store}"
        )
    if not settings.insecure and not is_loopback(split_address(settings.bind)[0]):
        raise ConfigError(
            f"{told('bind', settings.bind)}, which other machines can reach, and without --users every client "
            "there would be an administrator; --users is not built yet, so bind 127.0.0.1, or accept it with --insecure"
        )
    if settings.zkhost is not None and settings.advertise is None and split_address(settings.bind)[0] in WILDCARDS:
        raise ConfigError(
            f"{told('bind', settings.bind)}, which clients of other machines cannot connect to; say with --advertise "
            "HOST:PORT under which address they find this broker"
        )
    _check_ports(settings, sources)
    address = settings.http_address
    if address is None:
        return
    if not settings.insecure and not is_loopback(split_address(address)[0]):
        raise ConfigError(
            f"{told('pport', address)}, which other machines can reach, and without --users everybody there could "
            "read it; --users is not built yet, so take 127.0.0.1, or accept it with --insecure"
        )
    if address == settings.bind and split_address(address)[1]:
        raise ConfigError(f"{told('pport', address)}, which is bind already ({sources['bind']}); take another port")


def _check_ports(settings: Settings, sources: Mapping[str, str]) -> None:
    """Check that every worker has ports of its own: they count up from those given."""
    count = settings.workers
    if count == 1:
        return
    addresses = {"bind": settings.bind, "advertise": settings.advertise, "pport": settings.http_address}
    first = {name: split_address(address) for name, address in addresses.items() if address is not None}
    by = f"with {count} workers ({sources['workers']})"
    for name, (_, port) in first.items():
        if port + count - 1 > limits.PORT_MAX:
            raise ConfigError(
                f"{name} is {addresses[name]} ({sources[name]}); {by} the ports from {port} to {port + count - 1} are "
                f"needed, and {limits.PORT_MAX} is the last one"
            )
    if "pport" not in first:
        return
    (host, port), (http_host, http_port) = first["bind"], first["pport"]
    same_host = host == http_host or not WILDCARDS.isdisjoint({host, http_host})
    if same_host and port and http_port and abs(port - http_port) < count:
        raise ConfigError(
            f"pport is {addresses['pport']} ({sources['pport']}); {by} the ports from {http_port} on collide with "
            f"those from {port} on of bind ({sources['bind']}); take one from {port + count} on"
        )


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, (*READERS, *NOT_BUILT), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known settings: {', '.join(READERS)}"


def _misspelt(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    # Not an error: Kubernetes sets KITEQ_PORT and more like it for a service that is named kiteq.
    known = [ENVIRONMENT_PREFIX + name.upper() for name in READERS]
    others = {"KITEQ_CONFIG", "KITEQ_BROKER", "KITEQ_SECRET", "KITEQ_ZK_AUTH"}
    found = []
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in others or variable in known:
            continue
        if environ[variable].startswith("tcp://"):
            continue  # of Kubernetes; KITEQ_PORT is near to KITEQ_PPORT
        close = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
        found += [(variable, close[0])] if close else []
    return tuple(found)


def _from_toml(path: Path) -> dict[str, Given]:
    try:
        text = path.read_bytes().decode()
        table = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not valid TOML: it is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    given = {}
    for name, value in table.items():
        source = f"{path}, line {_line_of(name, text)}"
        given[name] = Given(value, source, is_toml=True)
        if name not in READERS and name not in NOT_BUILT:
            raise ConfigError(f"{source}: unknown setting {name!r}{_nearest(name)}")
    return given


def _line_of(key: str, text: str) -> int:
    """Return the line on which a top-level key stands; tomllib keeps none."""
    quoted = f"(?:{re.escape(key)}|\"{re.escape(key)}\"|'{re.escape(key)}')"
    stands = re.compile(rf"\s*(?:{quoted}\s*[=.]|\[\[?\s*{quoted}\s*[\].])")
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if stands.match(line) is None:
            continue
        try:
            tomllib.loads("\n".join(lines[:number]))
        except tomllib.TOMLDecodeError:
            continue  # inside a text of several lines
        return number + 1
    return 1
