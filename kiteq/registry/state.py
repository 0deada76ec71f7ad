"""How a registry is: what health checks, logs and starts tell of it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RegistryState"]


@dataclass(frozen=True, slots=True)
class RegistryState:
    """Whether the registry is as it should be. since: on the monotonic clock.

    session_over: nobody finds this process through the registry. reason: a sentence, "" when not degraded.
    """

    degraded: bool
    since: float
    session_over: bool
    reason: str
