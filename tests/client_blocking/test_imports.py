"""What importing and using the blocking client loads, and what it does not."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.client_blocking.parts import ROOT
from tests.test_tidy import CLIENT_MUST_NOT_LOAD


def test_using_the_blocking_client_loads_nothing_of_the_broker() -> None:
    # Nothing listens on port 1, so the first use goes as far as a connection attempt.
    program = f"""
import sys, threading
import kiteq_client.blocking
client = kiteq_client.blocking.Client("kiteq://127.0.0.1:1", group="lean", timeout=0.2)
assert threading.active_count() == 1
try:
    client.statistics()
except ConnectionError:
    print([name for name in {CLIENT_MUST_NOT_LOAD!r} if name in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "client")))}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
