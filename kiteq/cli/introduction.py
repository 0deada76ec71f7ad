"""What a broker, or a set of workers, says when it has started: what it uses, and how to try it."""

from __future__ import annotations

from collections.abc import Sequence

from kiteq import __version__, limits
from kiteq.config import Settings
from kiteq.values import folder_of, is_loopback, size_text, split_address

__all__ = ["introduction"]

DEFAULT_ADDRESS = Settings().bind


def introduction(settings: Settings, listening: Sequence[tuple[str, str | None]]) -> str:
    """Return in plain words what is used; listening: HOST:PORT of each broker and of its HTTP port."""
    addresses = [address for address, _ in listening]
    count = len(addresses)
    lines = {
        "store": _store(settings, count),
        "receipts": _receipts(settings),
        "topics": ", ".join(settings.topics) or f"any name, up to {limits.TOPICS_MAX:,}",
        "registry": _registry(settings, addresses),
        "clients": _clients(addresses[0]),
    }
    if count > 1:
        lines["workers"] = f"{count} brokers, each with its own messages; every limit is of each of them"
    if settings.advertise is not None and settings.zkhost is None:
        lines["advertise"] = _advertised(settings, count)
    http = [address for _, address in listening if address is not None]
    if http:
        lines["http"] = f"http://{_together(http)} has /stat, /binds, /healthz and /metrics"
    if settings.handlers:
        lines["handlers"] = ", ".join(settings.handlers)
    described = "\n".join(f"  {name:<10}{text}" for name, text in lines.items())
    topic = settings.topics[0] if settings.topics else "trade"
    where = "" if addresses[0] == DEFAULT_ADDRESS else f" --broker {_reachable(addresses[0])}"
    return (
        f"kiteq {__version__} serves on {_together(addresses)}\n{described}\n"
        f"Try it in two other terminals:\n  kiteq listen {topic}{where}\n  kiteq send {topic} greeting hello{where}\n"
        "Stop it with Ctrl-C."
    )


def _store(settings: Settings, count: int) -> str:
    folder = folder_of(settings.db)
    if folder is None:
        return f"{settings.db}, in memory only: everything is gone when it stops"
    text = f"{settings.db}, that is {folder.resolve()}, at most {size_text(settings.store_limit)}"
    if count == 1:
        return text
    return f"{text}; the same for the others in {', '.join(f'worker-{number}' for number in range(1, count))} in it"


def _receipts(settings: Settings) -> str:
    if folder_of(settings.db) is None:
        return "given when the message is in memory"
    return {
        "sync": "given when the message is on disk (--flush sync)",
        "async": "given before the message is on disk: a crash may lose some (--flush async)",
    }[settings.flush]


def _registry(settings: Settings, addresses: Sequence[str]) -> str:
    count = len(addresses)
    if settings.zkhost is not None:
        announced = _together(addresses) if settings.advertise is None else _advertised(settings, count)
        return (
            f"{settings.zkhost}, where clients find {'this broker' if count == 1 else 'these brokers'} as {announced}"
        )
    if count == 1:
        return "embedded: bindings are kept in the store"
    return "embedded: bindings are shared by the workers; a client of one is told of all"


def _clients(address: str) -> str:
    if is_loopback(split_address(address)[0]):
        return "only from this machine, and every one of them is an administrator"
    return "from every machine that reaches this one, without a password (--insecure); those here administrate"


def _advertised(settings: Settings, count: int) -> str:
    assert settings.advertise is not None
    if count == 1:
        unused = "" if settings.zkhost else ", which nobody asks for without --zkhost"
        return f"{settings.advertise}{unused}"
    host, _, port = settings.advertise.rpartition(":")
    return _together([f"{host}:{int(port) + number}" for number in range(count)])


def _together(addresses: Sequence[str]) -> str:
    """Return addresses in few words: ports that count up as a range."""
    host, _, first = addresses[0].rpartition(":")
    count = len(addresses)
    if count > 2 and list(addresses) == [f"{host}:{int(first) + number}" for number in range(count)]:
        return f"{addresses[0]} to {int(first) + count - 1}"
    return " and ".join(part for part in (", ".join(addresses[:-1]), addresses[-1]) if part)


def _reachable(address: str) -> str:
    host, port = split_address(address)
    return f"127.0.0.1:{port}" if host in {"0.0.0.0", "::"} else address  # noqa: S104 compared, not bound
