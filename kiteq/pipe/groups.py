"""A group: the connections that act as one consumer, and its subscriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kiteq.pipe.outlet import Outlet
    from kiteq.pipe.peer import Peer

__all__ = ["Group"]


class Group:
    """Members and outlets of one group name.

    absent_since: monotonic seconds when the last member left; None while somebody is there.
    """

    __slots__ = ("absent_since", "members", "name", "outlets")

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.members: list[Peer] = []
        self.outlets: dict[str, Outlet] = {}
        self.absent_since: float | None = now

    @property
    def connected(self) -> bool:
        """Whether a connection of the group is there: non-persistent bindings match only then."""
        return bool(self.members)

    @property
    def consuming(self) -> bool:
        """Whether a connection of the group takes messages."""
        return any(member.window and not member.leaving for member in self.members)

    def best_member(self, now: float) -> tuple[Peer | None, int]:
        """Return the member with most free credit, and how many messages to give it before looking again."""
        members = self.members
        if len(members) == 1:
            return members[0], members[0].free_credit(now)
        best: Peer | None = None
        most = second = 0
        for member in members:
            free = member.free_credit(now)
            if free > most:
                best, most, second = member, free, most
            elif free > second:
                second = free
        return best, min(most, most - second + 16) if best is not None else 0
