"""The address of a ZooKeeper registry, as users write it, and the credentials for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from kiteq.errors import ConfigError

__all__ = ["DEFAULT_PORT", "Credentials", "RegistryAddress", "parse_registry_url", "read_credentials"]

DEFAULT_PORT: Final = 2181
HOSTS_MAX: Final = 32
"""An ensemble has three to seven nodes; a list this long is a mistake."""
VARIABLE: Final = "KITEQ_ZK_AUTH"

_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_CHROOT: Final = re.compile(r"(/[A-Za-z0-9_:@+-][A-Za-z0-9._:@+-]*)+", re.ASCII)


class RegistryAddress(NamedTuple):
    """Where the registry is. hosts: HOST:PORT each. chroot: the folder in ZooKeeper, "" for its root."""

    hosts: tuple[str, ...]
    chroot: str

    def __str__(self) -> str:
        """Write it as a user would."""
        return f"zk://{','.join(self.hosts)}{self.chroot}"


class Credentials(NamedTuple):
    """Who we are to ZooKeeper, by SASL digest."""

    user: str
    password: str

    def __repr__(self) -> str:
        """Leave the password out."""
        return f"Credentials(user={self.user!r})"


def parse_registry_url(url: str) -> RegistryAddress:
    """Return the parts of `zk://host:2181,host2:2181/chroot`; ports and chroot may be left out.

    Raises `ValueError`, whose text never shows what stands before an "@".
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme != "zk":
        raise ValueError("the registry must be zk://host:2181, with more hosts after commas and a /chroot if wanted")
    if "@" in rest.partition("/")[0]:
        raise ValueError(f"a registry URL holds no user and no password; give them in {VARIABLE} as user:password")
    hosts_text, slash, chroot_text = rest.partition("/")
    chroot = f"/{chroot_text}".rstrip("/") if slash else ""
    if chroot and _CHROOT.fullmatch(chroot) is None:
        raise ValueError(f"{url!r}: the chroot is a path of names like /kiteq-test, not {chroot!r}")
    hosts = tuple(dict.fromkeys(_host(part.strip(), url) for part in hosts_text.split(",")))
    if len(hosts) > HOSTS_MAX:
        raise ValueError(f"the registry URL names {len(hosts)} hosts; at most {HOSTS_MAX} are allowed")
    return RegistryAddress(hosts, chroot)


def _host(text: str, url: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    if _HOST.fullmatch(host) is None:
        raise ValueError(f"{url!r}: {text!r} is not host:port")
    if not (port.isascii() and port.isdigit()) or len(port) > 5 or not 1 <= int(port) <= 65_535:
        raise ValueError(f"{url!r}: the port must be 1 to 65535, not {port[:64]!r}")
    return f"{host}:{int(port)}"


def read_credentials(environ: Mapping[str, str]) -> Credentials | None:
    """Return what `KITEQ_ZK_AUTH` says, None when it is not set. Raises `ConfigError`.

    It holds `user:password`, or the path of a file with that in one line: a path starts with "/" or ".".
    """
    text = environ.get(VARIABLE)
    if text is None:
        return None
    source = VARIABLE
    if text.startswith(("/", ".")):
        source = f"{VARIABLE}, the file {text}"
        try:
            text = Path(text).read_text().strip()
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{source}: it is not UTF-8 text") from None
    user, colon, password = text.partition(":")
    if not colon or not user or not password or "\n" in text:
        raise ConfigError(f"{source}: it must be user:password, or the path of a file that holds that in one line")
    return Credentials(user, password)
