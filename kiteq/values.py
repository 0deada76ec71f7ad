"""From one value as a flag, a variable or a file gives it to a checked one."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from kiteq import limits
from kiteq.message import check_name
from kiteq.registry_address import parse_registry_url

__all__ = [
    "READERS",
    "Given",
    "WrongValue",
    "duration",
    "folder_of",
    "is_loopback",
    "seconds_text",
    "size_text",
    "split_address",
]

STORE_BYTES_MIN: Final = 16 * limits.MIB
STORE_BYTES_CEILING: Final = 16_384 * limits.GIB
CONNECTIONS_CEILING: Final = 65_535

_SIZE_UNITS: Final = {
    "": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_TIME_UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)
_HANDLER = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_HOST = re.compile(r"(?=.{1,253}\Z)(?=[A-Za-z0-9])([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?", re.ASCII)
_YES: Final = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_FOLDER_SCHEMES: Final = ("lmdb", "mmap", "file")
_MEMORY_SCHEMES: Final = ("memory", "mock")


class Given(NamedTuple):
    """One value as it was found; text from a flag or the environment is read more freely than TOML."""

    value: object
    source: str
    is_toml: bool


class WrongValue(Exception):
    """A value that is not allowed; the text completes "it must be"."""


Reader = Callable[[Given], object]


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


def folder_of(url: str) -> Path | None:
    """Return the folder of an `lmdb:`, `mmap:` or `file:` URL, None for another kind.

    `lmdb:///var/lib/kiteq` is absolute, `lmdb://./data` and `lmdb://data` are relative.
    """
    parts = urlsplit(url)
    return Path(parts.netloc + parts.path) if parts.scheme in _FOLDER_SCHEMES else None


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


def seconds_text(seconds: float) -> str:
    """Return seconds as text, like 60s."""
    return f"{seconds:g}s"


def _text(value: object, allowed: str) -> str:
    if type(value) is not str:
        raise WrongValue(f"a string: {allowed}")
    return value


def _amount(value: object, units: Mapping[str, float], allowed: str) -> float:
    if type(value) in {int, float}:
        return value  # type: ignore[return-value]  # narrowed by the exact types, so that a bool is none
    match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2].lower() not in units:
        raise WrongValue(allowed)
    return float(match[1]) * units[match[2].lower()]


def _size(lowest: int, highest: int) -> Reader:
    allowed = f"a size from {size_text(lowest)} to {size_text(highest)}, like 64MiB"

    def read(given: Given) -> int:
        count = _amount(given.value, _SIZE_UNITS, allowed)
        if not lowest <= count <= highest:
            raise WrongValue(allowed)
        return int(count)

    return read


def duration(lowest: float, highest: float) -> Reader:
    """Return the reader of a time in seconds within bounds."""
    allowed = f"a time from {seconds_text(lowest)} to {seconds_text(highest)}, like 60s"

    def read(given: Given) -> float:
        seconds = _amount(given.value, _TIME_UNITS, allowed)
        if not lowest <= seconds <= highest:
            raise WrongValue(allowed)
        return float(seconds)

    return read


def _number(lowest: int, highest: int) -> Reader:
    allowed = f"a whole number from {lowest} to {highest}"

    def read(given: Given) -> int:
        value = given.value
        if not given.is_toml and isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value[:20])
        if type(value) is not int or not lowest <= value <= highest:
            raise WrongValue(allowed)
        return value

    return read


def _switch(given: Given) -> bool:
    value = given.value
    if not given.is_toml and isinstance(value, str) and value.lower() in _YES:
        return _YES[value.lower()]
    if type(value) is not bool:
        raise WrongValue("true or false")
    return value


def _choice(*choices: str) -> Reader:
    allowed = f"one of {', '.join(choices)}"

    def read(given: Given) -> str:
        text = _text(given.value, allowed)
        if text not in choices:
            raise WrongValue(allowed)
        return text

    return read


def _names(given: Given, allowed: str) -> list[str]:
    value = given.value
    if not given.is_toml and isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list | tuple) or not value or not all(type(name) is str for name in value):
        raise WrongValue(f"a list of {allowed}")
    return list(dict.fromkeys(value))


def _topics(given: Given) -> tuple[str, ...]:
    names = _names(given, "topic names (leave it out to serve every topic)")
    if len(names) > limits.TOPICS_MAX:
        raise WrongValue(f"at most {limits.TOPICS_MAX} topic names")
    for name in names:
        try:
            check_name("topic", name)
        except ValueError as error:
            raise WrongValue(f"a list of topic names: {error}") from None
    return tuple(names)


def _handlers(given: Given) -> tuple[str, ...]:
    names = _names(given, 'handlers, each as "module:Class"')
    for name in names:
        if _HANDLER.fullmatch(name) is None:
            raise WrongValue(f'a list of handlers, each as "module:Class"; {name!r} is not')
    return tuple(names)


def _bind(given: Given) -> str:
    text = _text(given.value, "HOST:PORT")
    try:
        split_address(text)
    except ValueError as error:
        raise WrongValue(str(error)) from None
    return text


def _pport(given: Given) -> str:
    allowed = "PORT or HOST:PORT with a port from 0 to 65535, like 13801"
    value = str(given.value) if type(given.value) is int else _text(given.value, allowed)
    if ":" in value:
        return _bind(given)
    if not value.isascii() or not value.isdigit() or len(value) > 5 or int(value) > 65_535:
        raise WrongValue(allowed)
    return str(int(value))


def _advertise(given: Given) -> str:
    text = _bind(given)
    host, port = split_address(text)
    if port == 0 or host in {"0.0.0.0", "::"}:  # noqa: S104 refused here, not bound
        raise WrongValue("the HOST:PORT at which clients reach this broker, not a wildcard")
    return text


def _zkhost(given: Given) -> str:
    text = _text(given.value, "HOST:PORT,... of ZooKeeper, with a /chroot behind if wanted")
    try:
        return str(parse_registry_url(text if "://" in text else f"zk://{text}"))
    except ValueError as error:
        raise WrongValue(f"HOST:PORT,... of ZooKeeper: {error}") from None


def _db(given: Given) -> str:
    known = "lmdb:///absolute/path, lmdb://./relative/path, memory:// or mock://"
    text = _text(given.value, known)
    scheme = text.partition("://")[0]
    if scheme == "mysql" or scheme.startswith("mysql+"):
        raise WrongValue(f"{known}; MySQL stores are not built yet")
    if "://" not in text or scheme not in _FOLDER_SCHEMES + _MEMORY_SCHEMES:
        raise WrongValue(known)
    try:
        parts = urlsplit(text)
    except ValueError:
        raise WrongValue(known) from None
    if scheme in _MEMORY_SCHEMES:
        if parts.netloc or parts.path.strip("/"):
            raise WrongValue(f"{scheme}:// alone: it has no path")
        return text
    if parts.netloc not in {"", ".", ".."} or not parts.path.strip("/") or "\0" in text:
        raise WrongValue(f"{scheme}:///absolute/path or {scheme}://./relative/path")
    return text


READERS: Final[Mapping[str, Reader]] = {
    "bind": _bind,
    "advertise": _advertise,
    "pport": _pport,
    "topics": _topics,
    "zkhost": _zkhost,
    "zk_timeout": duration(0.5, limits.ZK_SESSION_SECONDS_MAX),
    "workers": _number(1, limits.WORKERS_MAX),
    "db": _db,
    "flush": _choice("sync", "async"),
    "store_limit": _size(STORE_BYTES_MIN, STORE_BYTES_CEILING),
    "disk_free_min": _size(limits.PREALLOCATED_BYTES, STORE_BYTES_CEILING),
    "message_limit": _size(1, limits.BODY_BYTES_MAX_CEILING),
    "group_quota": _size(limits.MIB, STORE_BYTES_CEILING),
    "connections": _number(1, CONNECTIONS_CEILING),
    "ack_deadline": duration(0.1, limits.HOLD_SECONDS_MAX),
    "max_hold": duration(0.1, 7 * 86_400.0),
    "drain_timeout": duration(0.0, 3_600.0),
    "check_after": duration(limits.CHECK_AFTER_SECONDS_MIN, limits.CHECK_AFTER_SECONDS_MAX),
    "check_limit": _number(1, limits.CHECK_LIMIT_MAX),
    "checks_per_second": _number(1, limits.CHECKS_PER_SECOND_MAX),
    "check_elsewhere_after": duration(0.0, limits.CHECK_AFTER_SECONDS_MAX),
    "half_quota": _number(1, limits.HALF_QUOTA_MAX),
    "half_age_alarm": duration(1.0, limits.HALF_AGE_ALARM_SECONDS_MAX),
    "handlers": _handlers,
    "insecure": _switch,
    "log_level": _choice("debug", "info", "warning", "error"),
    "log_format": _choice("auto", "console", "json"),
}
