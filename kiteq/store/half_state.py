"""What becomes of the slot of an undecided transaction."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = ["DECIDING", "FREE", "OPEN", "PARKED", "State"]


class State(IntEnum):
    """What a slot holds."""

    FREE = 0
    PREPARING = 1
    """Not durable yet."""
    OPEN = 2
    PARKED = 3
    """Open, but the answers were "unknown" too often."""
    DECIDING = 4
    """The decision is on its way to the disk."""


FREE: Final = int(State.FREE)
OPEN: Final = int(State.OPEN)
PARKED: Final = int(State.PARKED)
DECIDING: Final = int(State.DECIDING)
"""As plain numbers: looking a member of an enumeration up costs as much as all else that is done with a slot."""
