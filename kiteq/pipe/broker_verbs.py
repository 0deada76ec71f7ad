"""Administrative verbs about the broker itself: who it is, what it does, and that it should end."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kiteq.pipe.overview import Overview, identity
from kiteq.pipe.reports import registry_figures

if TYPE_CHECKING:
    from kiteq.pipe.core import Core

__all__ = ["BrokerVerbs"]


class BrokerVerbs:
    """One method for each verb; `verbs` names them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._overview = Overview(core)
        self.verbs: dict[str, Callable[[dict[str, Any]], Any]] = {
            "broker.show": self._show,
            "broker.drain": self._drain,
            "overview": self._read_overview,
        }

    def _show(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        return identity(self._core) | {"registry": registry_figures(self._core), "pid": os.getpid()}

    def _drain(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Ask the broker to drain and end; it answers before it does."""
        core = self._core
        before = core.draining or core.stop_wanted.is_set()
        core.stop_wanted.set()
        return {
            "broker_id": core.store.broker_id,
            "draining_before": before,
            "drain_timeout_s": core.settings.drain_timeout,
        }

    async def _read_overview(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        return await self._overview.read()
