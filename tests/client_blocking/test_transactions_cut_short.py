"""Transactions without `async` that something cuts short: Ctrl-C, a close, a fork, a broker that is gone."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from kiteq_client import (
    ClientClosed,
    Decision,
    Message,
    Outcome,
    SendTimeout,
)
from kiteq_client.blocking import Client
from tests.client_blocking.parts import Checks, OwnError, Place, opened, run_program, started, texts, until
from tests.support.broker import BrokerProcess


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), asyncio.CancelledError()])
def test_what_ends_the_program_asks_nothing(place: Place, error: BaseException) -> None:
    checks = Checks(Decision.COMMIT)
    with opened(place, on_check=checks) as client:
        with pytest.raises(type(error)) as caught, client.transaction(place.message("half")) as tx:
            raise error
        assert caught.value is error
        assert (tx.outcome, checks.asked) == (Outcome.UNKNOWN, [])
        assert client.send(place.message()).durable


def test_the_error_of_a_hook_leaves_and_nothing_is_decided(place: Place) -> None:
    error = OwnError()

    def fail() -> None:
        raise error

    async def work() -> None:
        raise AssertionError

    with opened(place) as client:
        with pytest.raises(OwnError) as caught, client.transaction(place.message("half")) as tx:
            tx.on_leave(fail)
        assert caught.value is error
        assert tx.outcome is Outcome.UNKNOWN
        with pytest.raises(TypeError, match="coroutine"), client.transaction(place.message("half")) as tx:
            tx.on_leave(work)
        assert tx.outcome is Outcome.UNKNOWN
        assert texts(client, place) == []


def test_the_block_of_a_closed_client_does_not_run(place: Place) -> None:
    client = opened(place)
    client.close()
    with pytest.raises(ClientClosed), client.transaction(place.message()):
        pytest.fail("the block ran")


def test_closing_inside_the_block_leaves_the_decision_to_the_checks(place: Place) -> None:
    client = opened(place)
    with (
        pytest.raises(ClientClosed, match="your local transaction stands"),
        client.transaction(place.message("half")) as tx,
    ):
        client.close()
    assert tx.outcome is Outcome.UNKNOWN
    client = opened(place)
    with pytest.raises(OwnError), client.transaction(place.message("half")) as tx:
        client.close()
        raise OwnError
    assert tx.outcome is Outcome.UNKNOWN


def test_after_a_fork_only_the_parent_decides(place: Place) -> None:
    program = """
        client = blocking.Client(address, group=group, topics=[topic], bindings=[fanout(topic)])
        pid = None
        try:
            with client.transaction(message("half")) as tx:
                pid = os.fork()
        except RuntimeError as error:
            assert pid == 0
            print(str(error).replace(str(os.getppid()), "PARENT"))
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        print(tx.outcome)

        with client.transaction(message("half")) as tx:
            pid = os.fork()
            if pid == 0:
                sys.exit(3)  # an exception in the block, in the child
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        print(tx.outcome)
    """
    assert run_program(program, place) == [
        "committed",
        "committed",
        "this transaction was begun by process PARENT, and only that decides it",
    ]


@pytest.mark.slow
def test_a_commit_without_an_answer_is_pending_and_sent_again(place: Place, tmp_path: Path) -> None:
    with BrokerProcess(tmp_path) as broker:
        client = Client(broker.address, group="g", topics=["trade"], timeout=0.5)
        with client.transaction(Message("trade", "pay")) as tx:
            broker.kill()
        assert tx.outcome is Outcome.PENDING
        broker.start()
        until(lambda: tx.outcome is Outcome.COMMITTED)
        client.close()


@pytest.mark.slow
def test_ctrl_c_in_a_commit_leaves_it_pending(place: Place, tmp_path: Path) -> None:
    with BrokerProcess(tmp_path) as broker:
        program = """
            def interrupt():
                while client.statistics().pending_decisions == 0:
                    pass
                os.kill(os.getpid(), signal.SIGINT)

            client = blocking.Client(address, group=group, topics=[topic], timeout=20)
            try:
                with client.transaction(message()) as tx:
                    threading.Thread(target=interrupt).start()
                    print("ready")
                    sys.stdin.readline()
            except KeyboardInterrupt:
                print(tx.outcome)
                sys.stdin.readline()
                while tx.outcome is Outcome.PENDING:
                    time.sleep(0.01)
                print(tx.outcome)
        """
        with started(program, Place(broker.address, "trade", "g")) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            broker.kill()
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "pending\n"
            broker.start()
            assert process.communicate("go\n", timeout=20) == ("committed\n", "")


def test_a_prepare_without_an_answer_raises_and_the_block_does_not_run(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path) as broker, Client(broker.address, group="g", topics=["trade"], timeout=0.3) as client:
        client.send(Message("trade", "pay"))
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            with pytest.raises(SendTimeout, match="not begun"), client.transaction(Message("trade", "pay")):
                pytest.fail("the block ran")
        finally:
            os.kill(broker.pid, signal.SIGCONT)


def test_an_interrupt_between_the_beginning_and_the_block_leaves_it_to_the_checks(place: Place) -> None:
    with opened(place) as client:
        early = client.transaction(place.message("half"))
        early._dropped = True  # as if the interrupt came while the broker was asked
        early.__enter__()
        late = client.transaction(place.message("half")).__enter__()
        assert late._portal is not None
        late._portal.call_plain(late._drop)
        assert (early.outcome, late.outcome) == (Outcome.UNKNOWN, Outcome.UNKNOWN)
        assert texts(client, place) == []
