"""The address of a registry, as users write it, to the brokers it names."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["DEFAULT_PORT", "Address", "is_zookeeper", "parse_broker", "parse_registry"]

DEFAULT_PORT: Final = 13800


class Address(NamedTuple):
    """Where a broker listens."""

    host: str
    port: int

    def __str__(self) -> str:
        """Write it as a user would."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_zookeeper(registry: str) -> bool:
    """Whether brokers are found through ZooKeeper."""
    return registry.startswith("zk://")


def parse_registry(registry: str) -> tuple[Address, ...]:
    """Return the brokers of `kiteq://host:port,host2:port` or of a bare `host:port`.

    Raises `ValueError` for anything else.
    """
    scheme, separator, rest = registry.partition("://")
    if not separator:
        scheme, rest = "kiteq", registry
    if scheme != "kiteq":
        raise ValueError(
            f"{registry!r}: the registry must be kiteq://host:port or zk://host:port, with more hosts after commas"
        )
    return tuple(dict.fromkeys(_parse_address(part.strip(), registry) for part in rest.rstrip("/").split(",")))


def parse_broker(text: str) -> Address:
    """Return the address of one broker. Raises `ValueError`."""
    return _parse_address(text, text)


def _parse_address(text: str, registry: str) -> Address:
    host, colon, port_text = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port_text = text, str(DEFAULT_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{registry!r}: write an IPv6 address in brackets, as in [::1]:{DEFAULT_PORT}")
    if not host or any(character in host for character in "/@? #"):
        raise ValueError(f"{registry!r}: {text!r} is not host:port")
    if not (port_text.isascii() and port_text.isdigit()) or not 1 <= int(port_text) <= 65_535:
        raise ValueError(f"{registry!r}: the port must be 1 to 65535, not {port_text!r}")
    return Address(host, int(port_text))
