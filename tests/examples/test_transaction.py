"""`examples/transaction.py` beside a listener, as in the README."""

from __future__ import annotations

from typing import Final

import pytest

from tests.examples.programs import ROOT, Stage

PROGRAM: Final = str(ROOT / "examples" / "transaction.py")
READY: Final = "answering the broker; Ctrl-C ends"


@pytest.mark.slow
def test_what_is_committed_is_delivered_and_nothing_else(stage: Stage) -> None:
    listener = stage.start("-m", "kiteq", "listen", "trade")
    listener.wait_for("listening to trade")

    rolling_back = stage.start(PROGRAM, "rollback")
    rolling_back.wait_for(READY)
    assert "message rolled back\n" in rolling_back.output
    rolling_back.stop()
    for mode, answer in (("crash-before-commit", "rollback"), ("crash-after-commit", "commit")):
        stage.start(PROGRAM, mode).wait_killed()
        again = stage.start(PROGRAM, "answer")
        again.wait_for(f"the broker asks about 'order ({mode})': {answer}")
        again.stop()
    listener.wait_for("order (crash-after-commit)")
    committing = stage.start(PROGRAM, "commit")
    committing.wait_for(READY)
    assert "message committed\n" in committing.output
    committing.stop()

    listener.wait_for("order (commit)")
    delivered = [line.partition(": ")[2] for line in listener.output.splitlines()[1:]]
    assert delivered == ["order (crash-after-commit)", "order (commit)"]


def test_a_wrong_mode_is_refused(stage: Stage) -> None:
    status, output = stage.run(PROGRAM, "comit")
    assert status == 1
    assert output.startswith("usage: python examples/transaction.py commit|rollback|")
