"""What a service says at each step, and where it can be made to die."""

from __future__ import annotations

import os
import signal
import time

STEPS = {
    "before-prepare": "before the half message is sent",
    "after-prepare": "the half message is on the broker's disk, the database transaction not begun",
    "in-local-transaction": "rows written, not committed",
    "after-local-commit": "the database has committed, the block of the message is not left",
    "before-commit-sent": "the marker's row was found, the commit of the message is not sent",
    "after-commit-sent": "the commit of the message is on the broker's disk",
    "while-handling": "a message of the other service has arrived, nothing is done",
    "before-ack": "a message of the other service is handled, not acked",
    "during-check": "the broker has asked, the answer is not sent",
}


class Steps:
    """Prints one line per step; kills the process, as kill -9 does, at the one named `crash_at`."""

    def __init__(self, service: str, crash_at: str | None) -> None:
        self._service = service
        self._crash_at = crash_at

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self._service}: {text}", flush=True)

    def reach(self, step: str) -> None:
        if step == self._crash_at:
            self.say(f"CRASH here, at {step}: {STEPS[step]}")
            os.kill(os.getpid(), signal.SIGKILL)


def name_of(order: str) -> str:
    """Return the short name of an order: ids are 32 hex digits, and the last ones are random."""
    return f"order {order[-6:]}"
