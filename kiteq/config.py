"""Settings of a broker: flags over environment (`KITEQ_*`) over TOML over defaults, checked as one."""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from kiteq import limits
from kiteq.errors import ConfigError
from kiteq.message import check_name

__all__ = ["NOT_BUILT", "NotBuilt", "Resolved", "Settings", "load", "split_address"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a broker runs with; `load` makes checked ones.

    bind: HOST:PORT to listen on, port 0 for any free one. advertise: HOST:PORT to announce instead.
    topics: topics served, empty for any name. db: URL of the store. flush: when a receipt is given.
    Fields ending in `_limit` and `group_quota` are bytes; times are seconds.
    handlers: "module:Class" of own pipeline handlers. insecure: allow other machines in without users.
    """

    bind: str = "127.0.0.1:13800"
    advertise: str | None = None
    topics: tuple[str, ...] = ()
    db: str = "lmdb://./kiteq-data"
    flush: Literal["sync", "async"] = "sync"
    store_limit: int = limits.STORE_BYTES_MAX_DEFAULT
    message_limit: int = limits.BODY_BYTES_MAX_DEFAULT
    group_quota: int = limits.GROUP_QUOTA_BYTES_DEFAULT
    connections: int = limits.CONNECTIONS_MAX_DEFAULT
    ack_deadline: float = limits.ACK_DEADLINE_SECONDS
    max_hold: float = limits.HOLD_SECONDS_MAX
    drain_timeout: float = limits.DRAIN_SECONDS
    handlers: tuple[str, ...] = ()
    insecure: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"


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
    "zkhost": "several brokers through ZooKeeper",
    "pport": "the HTTP port",
    "workers": "worker processes",
}
"""Names that are kept for later, with the feature they stand for."""

ENVIRONMENT_PREFIX: Final = "KITEQ_"
DEFAULT_SOURCE: Final = "default"
STORE_BYTES_MIN: Final = 16 * limits.MIB
STORE_BYTES_CEILING: Final = 16_384 * limits.GIB
CONNECTIONS_CEILING: Final = 65_535
MESSAGES_IN_STORE_MIN: Final = 4

_SIZE_UNITS: Final = {
    "": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_TIME_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)
_HANDLER = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})", re.ASCII)
_YES: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_FOLDER_SCHEMES: Final = ("lmdb", "mmap", "file")
_MEMORY_SCHEMES: Final = ("memory", "mock")


class Given(NamedTuple):
    """One value as it was found; text from a flag or the environment is read more freely than TOML."""

    value: object
    source: str
    is_toml: bool


class _Wrong(Exception):
    """A value that is not allowed; the text completes "it must be ..."."""


Reader = Callable[[object, bool], object]


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT` or `[IPV6]:PORT`. Raises `ValueError` saying what is allowed."""
    host, colon, port_text = text.rpartition(":")
    if not colon or not port_text.isascii() or not port_text.isdigit() or int(port_text) > 65_535:
        raise ValueError("HOST:PORT with a port from 0 to 65535, like 127.0.0.1:13800")
    if not host:
        raise ValueError(f"HOST:PORT; for every address of this machine write 0.0.0.0:{port_text}")
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(port_text)
        except ValueError:
            raise ValueError("HOST:PORT; an IPv6 address is written [::1]:13800") from None
    if ":" in host:
        raise ValueError("HOST:PORT; an IPv6 address is written [::1]:13800")
    if _HOST.fullmatch(host) is None:
        raise ValueError("HOST:PORT, where HOST is a name or an address")
    return host, int(port_text)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def size_text(count: int) -> str:
    """Return bytes the way a person writes them, like 64GiB."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor and count % factor == 0:
            return f"{count // factor}{unit}"
    return f"{count}B"


def _seconds_text(seconds: float) -> str:
    return f"{seconds:g}s"


def _text(value: object, allowed: str) -> str:
    if type(value) is not str:
        raise _Wrong(f"a string: {allowed}")
    return value


def _amount(value: object, units: Mapping[str, float], allowed: str) -> float:
    if type(value) in {int, float}:
        return value  # type: ignore[return-value]  # narrowed by the exact types, so that a bool is none
    match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2].lower() not in units:
        raise _Wrong(allowed)
    return float(match[1]) * units[match[2].lower()]


def _size(lowest: int, highest: int) -> Reader:
    allowed = f"a size from {size_text(lowest)} to {size_text(highest)}, like 64MiB"

    def read(value: object, _is_toml: bool) -> int:
        count = _amount(value, _SIZE_UNITS, allowed)
        if not lowest <= count <= highest:
            raise _Wrong(allowed)
        return int(count)

    return read


def _duration(lowest: float, highest: float) -> Reader:
    allowed = f"a time from {_seconds_text(lowest)} to {_seconds_text(highest)}, like 60s"

    def read(value: object, _is_toml: bool) -> float:
        seconds = _amount(value, _TIME_UNITS, allowed)
        if not lowest <= seconds <= highest:
            raise _Wrong(allowed)
        return float(seconds)

    return read


def _number(lowest: int, highest: int) -> Reader:
    allowed = f"a whole number from {lowest} to {highest}"

    def read(value: object, is_toml: bool) -> int:
        if not is_toml and isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value[:20])
        if type(value) is not int or not lowest <= value <= highest:
            raise _Wrong(allowed)
        return value

    return read


def _switch(value: object, is_toml: bool) -> bool:
    if not is_toml and isinstance(value, str) and value.lower() in _YES:
        return _YES[value.lower()]
    if type(value) is not bool:
        raise _Wrong("true or false")
    return value


def _choice(*choices: str) -> Reader:
    allowed = f"one of {', '.join(choices)}"

    def read(value: object, _is_toml: bool) -> str:
        text = _text(value, allowed)
        if text not in choices:
            raise _Wrong(allowed)
        return text

    return read


def _names(value: object, is_toml: bool, allowed: str) -> list[str]:
    if not is_toml and isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list | tuple) or not value or not all(type(name) is str for name in value):
        raise _Wrong(f"a list of {allowed}")
    return list(dict.fromkeys(value))


def _topics(value: object, is_toml: bool) -> tuple[str, ...]:
    names = _names(value, is_toml, "topic names (leave it out to serve every topic)")
    if len(names) > limits.TOPICS_MAX:
        raise _Wrong(f"at most {limits.TOPICS_MAX} topic names")
    for name in names:
        try:
            check_name("topic", name)
        except ValueError as error:
            raise _Wrong(f"a list of topic names: {error}") from None
    return tuple(names)


def _handlers(value: object, is_toml: bool) -> tuple[str, ...]:
    names = _names(value, is_toml, 'handlers, each as "module:Class"')
    for name in names:
        if _HANDLER.fullmatch(name) is None:
            raise _Wrong(f'a list of handlers, each as "module:Class"; {name!r} is not')
    return tuple(names)


def _bind(value: object, _is_toml: bool) -> str:
    text = _text(value, "HOST:PORT")
    try:
        split_address(text)
    except ValueError as error:
        raise _Wrong(str(error)) from None
    return text


def _advertise(value: object, _is_toml: bool) -> str:
    text = _bind(value, _is_toml)
    host, port = split_address(text)
    if port == 0 or host in {"0.0.0.0", "::"}:  # noqa: S104 refused here, not bound
        raise _Wrong("the HOST:PORT at which clients reach this broker, not a wildcard")
    return text


def _db(value: object, _is_toml: bool) -> str:
    known = "lmdb:///absolute/path, lmdb://./relative/path, memory:// or mock://"
    text = _text(value, known)
    scheme = text.partition("://")[0]
    if scheme == "mysql" or scheme.startswith("mysql+"):
        raise _Wrong(f"{known}; MySQL stores are not built yet")
    if "://" not in text or scheme not in _FOLDER_SCHEMES + _MEMORY_SCHEMES:
        raise _Wrong(known)
    try:
        parts = urlsplit(text)
    except ValueError:
        raise _Wrong(known) from None
    if scheme in _MEMORY_SCHEMES:
        if parts.netloc or parts.path.strip("/"):
            raise _Wrong(f"{scheme}:// alone: it has no path")
        return text
    if parts.netloc not in {"", ".", ".."} or not parts.path.strip("/") or "\0" in text:
        raise _Wrong(f"{scheme}:///absolute/path or {scheme}://./relative/path")
    return text


READERS: Final[Mapping[str, Reader]] = {
    "bind": _bind,
    "advertise": _advertise,
    "topics": _topics,
    "db": _db,
    "flush": _choice("sync", "async"),
    "store_limit": _size(STORE_BYTES_MIN, STORE_BYTES_CEILING),
    "message_limit": _size(1, limits.BODY_BYTES_MAX_CEILING),
    "group_quota": _size(limits.MIB, STORE_BYTES_CEILING),
    "connections": _number(1, CONNECTIONS_CEILING),
    "ack_deadline": _duration(0.1, limits.HOLD_SECONDS_MAX),
    "max_hold": _duration(0.1, 7 * 86_400.0),
    "drain_timeout": _duration(0.0, 3_600.0),
    "handlers": _handlers,
    "insecure": _switch,
    "log_level": _choice("debug", "info", "warning", "error"),
    "log_format": _choice("auto", "console", "json"),
}


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
            reader(None, given.is_toml)
        return reader(given.value, given.is_toml)
    except _Wrong as error:
        if name == "db" and "@" in shown:
            shown = "a URL with a user"  # it may hold a password
        raise ConfigError(f"{name} is {shown} ({given.source}); it must be {error}") from None


def _check_together(settings: Settings, sources: Mapping[str, str]) -> None:
    def told(name: str, value: str) -> str:
        return f"{name} is {value} ({sources[name]})"

    if settings.max_hold < settings.ack_deadline:
        raise ConfigError(
            f"{told('max_hold', _seconds_text(settings.max_hold))}; it must be at least ack_deadline, "
            f"which is {_seconds_text(settings.ack_deadline)} ({sources['ack_deadline']})"
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


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, (*READERS, *NOT_BUILT), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known settings: {', '.join(READERS)}"


def _misspelt(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    # Not an error: Kubernetes sets KITEQ_PORT and more like it for a service that is named kiteq.
    known = [ENVIRONMENT_PREFIX + name.upper() for name in READERS]
    others = {"KITEQ_CONFIG", "KITEQ_BROKER", "KITEQ_SECRET"}
    found = []
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in others or variable in known:
            continue
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
