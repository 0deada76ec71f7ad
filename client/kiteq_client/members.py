"""Which brokers there are, as a list or a registry tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

from kiteq_client.registry import Address, parse_broker

__all__ = ["Listed", "Member", "Members"]


class Member(NamedTuple):
    """A broker that may be connected. serves: its topics, None for all. name, epoch: "" and 0 where unknown."""

    address: Address
    serves: frozenset[str] | None = None
    name: str = ""
    epoch: int = 0

    def serves_topic(self, topic: str) -> bool:
        """Whether it serves a topic."""
        return self.serves is None or topic in self.serves

    def serves_also(self, others: frozenset[str] | None) -> frozenset[str] | None:
        """Return its topics together with others; None for all."""
        return None if self.serves is None or others is None else self.serves | others

    def is_before(self, other: Member) -> bool:
        """Whether this was an earlier start of the same broker, elsewhere."""
        return self.name == other.name and self.address != other.address and self.epoch < other.epoch


class Members(Protocol):
    """The source of a client's brokers.

    refusal: why the source does not speak to us, for good.
    """

    refusal: Exception | None

    @property
    def has_topics(self) -> bool:
        """Whether it tells who serves which topic."""

    @property
    def source(self) -> str:
        """Return where brokers are found, as a user writes it."""

    def prepare(self) -> None:
        """Read the environment. Raises `ConfigError`."""

    def known(self) -> Mapping[Address, Member]:
        """Return the brokers known now."""

    def told(self, by: Address, addresses: Iterable[str]) -> None:
        """Learn the set of the broker at an address. Raises `ValueError`."""

    def state(self) -> str:
        """Return in words how the source is; "" if it has no state."""

    def problem(self, topics: Iterable[str]) -> str:
        """Return in words why there may be no broker for one of these topics; "" if the source is not the reason."""

    async def run(self, changed: Callable[[], None]) -> None:
        """Follow the source; call `changed` when it tells something else."""


class Listed:
    """The brokers of `kiteq://host:port,host2:port`, and those of their sets."""

    def __init__(self, addresses: Iterable[Address]) -> None:
        self.refusal: Exception | None = None
        self._listed = dict.fromkeys(addresses)
        self._sets: dict[Address, frozenset[Address]] = {}

    @property
    def has_topics(self) -> bool:
        """It says nothing of topics: every broker is taken to serve all."""
        return False

    @property
    def source(self) -> str:
        """Return where brokers are found."""
        return "kiteq://" + ",".join(map(str, self._listed))

    def prepare(self) -> None:
        """Do nothing: a list needs nothing of the environment."""

    def known(self) -> dict[Address, Member]:
        """Return the brokers of the list, then those that they told of."""
        addresses = dict(self._listed)
        for told in self._sets.values():
            addresses.update(dict.fromkeys(sorted(told)))
        return {address: Member(address) for address in addresses}

    def told(self, by: Address, addresses: Iterable[str]) -> None:
        """Learn the set of the broker at an address, instead of what it or others of the set told before."""
        told = frozenset(
            Address(by.host, parse_broker(f"x{text}").port) if text.startswith(":") else parse_broker(text)
            for text in addresses
        )
        self._sets = {other: known for other, known in self._sets.items() if other != by and not known & told}
        self._sets[by] = told

    def state(self) -> str:
        """Return "": a list has no state."""
        return ""

    def problem(self, _topics: Iterable[str]) -> str:
        """Return "": a list is never the reason."""
        return ""

    async def run(self, _changed: Callable[[], None]) -> None:
        """Return: a list changes only by `told`."""
