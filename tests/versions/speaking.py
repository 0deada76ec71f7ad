"""A broker that speaks other wire versions than the present ones: `python -m tests.versions.speaking`.

It is what a broker of another release is to a client: everything else is the broker as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from kiteq.remoting import packets
from tests.support.broker import BrokerProcess

__all__ = ["broker_speaking"]

VERSIONS_VARIABLE: Final = "SPEAKING_VERSIONS"
REPOSITORY: Final = Path(__file__).resolve().parents[2]


def broker_speaking(folder: Path, *versions: int) -> BrokerProcess:
    """Return a broker, not started yet, that speaks these wire versions."""
    environment = {
        VERSIONS_VARIABLE: " ".join(map(str, versions)),
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'client'}",
    }
    return BrokerProcess(folder, environment=environment, module="tests.versions.speaking", ready=False)


if __name__ == "__main__":
    # Before anything has looked at it.
    packets.WIRE_VERSIONS = tuple(map(int, os.environ[VERSIONS_VARIABLE].split()))  # type: ignore[assignment, misc]
    from kiteq.__main__ import main

    main()
