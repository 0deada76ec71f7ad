"""How many transactions of a producer group are undecided, and for how long."""

from __future__ import annotations

__all__ = ["GroupTally"]


class GroupTally:
    """Transactions of one producer group that are not decided. `parked` are among the `open`.

    oldest_s: when the oldest was prepared, seconds since 1970, 0 for none; found out every few seconds.
    alarmed: whether it was warned about that age.
    """

    __slots__ = ("alarmed", "name", "oldest_s", "open", "parked")

    def __init__(self, name: str) -> None:
        self.name = name
        self.oldest_s = 0
        self.alarmed = False
        self.open = 0
        self.parked = 0
