"""Sending without `async`: results, errors, many threads, and when there is no broker."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import traceback
from pathlib import Path

import pytest
import trio

from kiteq_client import (
    ClientClosed,
    Message,
    MessageTooLarge,
    NotConnected,
    PartlySent,
    Receipt,
    Refused,
    SendTimeout,
    direct,
    fanout,
)
from kiteq_client.blocking import Client
from tests.client_blocking.parts import Place, Running, run_program, started, until
from tests.support.broker import BrokerProcess, free_port


def test_a_send_returns_its_receipt_and_a_repeat_is_a_duplicate(place: Place) -> None:
    with place.client(topics=[place.topic], bindings=[fanout(place.topic)]) as client:
        message = place.message(b"once")
        receipt = client.send(message)
        assert (receipt.message_id, receipt.groups, receipt.duplicate, receipt.durable) == (message.id, 1, False, True)
        assert client.send(message).duplicate


def test_send_many_returns_receipts_in_order(place: Place) -> None:
    with place.client() as client:
        messages = [place.message(b"%d" % number) for number in range(500)]
        assert [receipt.message_id for receipt in client.send_many(iter(messages))] == [item.id for item in messages]
        assert client.send_many([]) == []


def test_sixteen_threads_get_their_own_receipts_and_nothing_is_lost(place: Place) -> None:
    with place.client(bindings=[fanout(place.topic)]) as client:
        messages = [[place.message(b"%d" % thread) for _ in range(60)] for thread in range(16)]
        sending = Running(lambda thread: [client.send(message) for message in messages[thread]], 16)
        sending.join()
        for thread in range(16):
            receipts = sending.results[thread]
            assert isinstance(receipts, list)
            assert [receipt.message_id for receipt in receipts] == [message.id for message in messages[thread]]
        wanted = {message.id for some in messages for message in some}
        for delivery in client.deliveries():
            wanted.remove(delivery.id)
            delivery.ack()
            if not wanted:
                break
        assert client.statistics().sent == 960


def test_the_first_call_connects_and_threads_that_come_together_share_one_connection(place: Place) -> None:
    client = place.client()
    sending = Running(lambda _: client.send(place.message()), 8)
    sending.join()
    assert client.statistics().sent == 8
    client.close()


def test_errors_are_those_of_the_async_client_and_show_both_sides(place: Place) -> None:
    with place.client() as client:
        with pytest.raises(MessageTooLarge) as caught:
            client.send(place.message(b"x" * 2_000_000))
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert names[0] == "test_errors_are_those_of_the_async_client_and_show_both_sides"
        assert "kiteq_client" in traceback.extract_tb(caught.value.__traceback__)[-1].filename
        with pytest.raises(ValueError, match="ttl must be"):
            client.send(place.message(ttl=-1))
        with pytest.raises(PartlySent) as partly:
            client.send_many([place.message(), place.message(b"x" * 2_000_000)])
        assert [type(result) for result in partly.value.results] == [Receipt, MessageTooLarge]
        with pytest.raises(Refused):
            client.admin("no.such.verb")
        assert client.send(place.message()).durable


def test_bindings_administration_and_statistics(place: Place) -> None:
    with place.client() as client:
        assert client.send(place.message()).groups == 0
        client.subscribe(direct(place.topic, "pay"))
        assert client.send(place.message()).groups == 1
        assert place.group in str(client.admin("group.list"))
        client.unsubscribe(direct(place.topic, "pay"))
        assert client.send(place.message()).groups == 0
        assert client.statistics().connected == (place.address,)


def test_it_is_built_without_a_broker_and_connects_once_there_is_one(tmp_path: Path) -> None:
    broker = BrokerProcess(tmp_path)
    client = Client(broker.address, group="g", timeout=0.5)
    assert threading.active_count() == len(threading.enumerate())
    with pytest.raises(NotConnected):
        client.send(Message("trade", "pay"))
    with pytest.raises(NotConnected), Client(broker.address, group="g", timeout=0.5):
        pytest.fail("entered without a broker")
    with broker:
        assert client.send(Message("trade", "pay")).durable
        client.close()


def test_without_wait_it_opens_and_the_call_fails() -> None:
    with Client(f"127.0.0.1:{free_port()}", group="g", timeout=0.3, wait=False) as client:
        assert client.statistics().connected == ()
        with pytest.raises(NotConnected):
            client.send(Message("trade", "pay"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"registry": "http://x", "group": "g"}, "registry"),
        ({"registry": "127.0.0.1", "group": ""}, "group"),
        ({"registry": "127.0.0.1", "group": "g", "prefetch": 0}, "prefetch"),
        ({"registry": "127.0.0.1", "group": "g", "topics": "trade"}, "topics must be a list"),
        ({"registry": "127.0.0.1", "group": "g", "concurrency": 0, "on_message": print}, "concurrency"),
    ],
)
def test_a_value_out_of_range_is_refused_when_it_is_built(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Client(**arguments)  # type: ignore[arg-type]


def test_in_the_thread_of_an_event_loop_it_names_the_async_client(place: Place) -> None:
    client = place.client()

    async def call() -> None:
        for attempt in (lambda: client.send(place.message()), client.deliveries, client.close, client.__enter__):
            with pytest.raises(RuntimeError, match=r"use kiteq_client\.Client"):
                attempt()

    async def call_in_a_thread() -> bool:
        await asyncio.sleep(0)
        return (await asyncio.to_thread(client.send, place.message())).durable

    asyncio.run(call())
    trio.run(call)
    assert asyncio.run(call_in_a_thread())
    client.close()


def test_after_closing_every_call_says_so(place: Place) -> None:
    client = place.client()
    client.close()
    client.close()
    for call in (lambda: client.send(place.message()), client.statistics, client.__enter__):
        with pytest.raises(ClientClosed):
            call()


def test_closing_while_calls_are_under_way_ends_each_with_a_result(place: Place) -> None:
    client = place.client()
    counts = [0] * 8

    def send(thread: int) -> None:
        while True:
            client.send(place.message())
            counts[thread] += 1

    sending = Running(send, 8)
    until(lambda: min(counts) > 3)
    client.close()
    sending.wait()
    assert {type(error) for error in sending.errors.values()} == {ClientClosed}
    assert len(sending.errors) == 8


def test_closing_while_it_connects_does_not_wait_for_a_broker() -> None:
    client = Client(f"127.0.0.1:{free_port()}", group="g", timeout=60)
    sending = Running(lambda _: client.send(Message("trade", "pay")))
    until(lambda: client._live is not None)
    client.close()
    sending.wait()
    assert type(sending.errors[0]) is ClientClosed


@pytest.mark.slow
def test_a_broker_that_restarts_under_load_loses_nothing(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path) as broker:
        client = Client(broker.address, group="g", bindings=[fanout("trade")], timeout=30)
        over = threading.Event()
        sent: list[bytes] = []

        def send(_: int) -> None:
            while not over.is_set():
                message = Message("trade", "pay")
                try:
                    sent.append(client.send(message).message_id)
                except Refused as refused:
                    if not refused.temporary:  # it is, while the broker is being stopped
                        raise

        sending = Running(send, 8)
        until(lambda: len(sent) > 50)
        broker.restart()
        count = len(sent)
        until(lambda: len(sent) > count + 50)
        broker.kill()
        broker.start()
        count = len(sent)
        until(lambda: len(sent) > count + 50)
        over.set()
        sending.join()
        missing = set(sent)
        for delivery in client.deliveries():
            missing.discard(delivery.id)
            delivery.ack()
            if not missing:
                break
        assert client.statistics().reconnects >= 2
        client.close()


def test_two_clients_share_the_thread(place: Place) -> None:
    with place.client() as one, place.client() as two:
        one.send(place.message())
        two.send(place.message())
        assert [thread.name for thread in threading.enumerate()].count("kiteq-client") == 1
    with place.client() as again:
        assert again.send(place.message()).durable


def test_threads_that_open_and_close_clients_do_not_wait_for_each_other_for_ever(place: Place) -> None:
    def work(_: int) -> None:
        for _ in range(20):
            with place.client() as client:
                client.statistics()

    Running(work, 6).join()


def test_a_dropped_client_warns_and_leaves(place: Place) -> None:
    client = place.client()
    client.send(place.message())
    with pytest.warns(ResourceWarning, match="dropped without close"):
        del client


@pytest.mark.slow
def test_ctrl_c_ends_a_blocked_call_at_once(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path) as broker:
        program = """
            def interrupt():
                while client.statistics().in_flight == 0:
                    pass
                os.kill(os.getpid(), signal.SIGINT)

            client = blocking.Client(address, group=group, timeout=20)
            client.send(message())
            print("ready")
            sys.stdin.readline()
            threading.Thread(target=interrupt, daemon=True).start()
            try:
                client.send(message())
            except KeyboardInterrupt:
                print("interrupted")
                os._exit(0)
        """
        with started(program, Place(broker.address, "trade", "g")) as process:
            os.kill(broker.pid, signal.SIGSTOP)
            try:
                assert process.communicate("go\n", timeout=10) == ("interrupted\n", "")
            finally:
                os.kill(broker.pid, signal.SIGCONT)


def test_an_unanswered_send_is_a_timeout_of_unknown_outcome(tmp_path: Path) -> None:
    with BrokerProcess(tmp_path) as broker, Client(broker.address, group="g", timeout=0.3) as client:
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            with pytest.raises(SendTimeout, match="unknown"):
                client.send(Message("trade", "pay"))
        finally:
            os.kill(broker.pid, signal.SIGCONT)


def test_the_end_of_the_interpreter_closes_what_nobody_closed(place: Place) -> None:
    program = """
        client = blocking.Client(address, group=group, topics=[topic])
        print(client.send(message()).durable)
    """
    assert run_program(program, place) == ["True"]


def test_the_end_of_the_interpreter_without_a_broker_is_the_end() -> None:
    program = """
        client = blocking.Client(address, group=group, timeout=0.2)
        try:
            client.send(message())
        except NotConnected:
            print("not connected")
    """
    assert run_program(program, Place(f"127.0.0.1:{free_port()}", "trade", "g"))[-1] == "not connected"


@pytest.mark.parametrize(
    ("module", "function"), [("gevent.monkey", "is_module_patched"), ("eventlet.patcher", "is_monkey_patched")]
)
def test_green_threads_are_refused_instead_of_hanging(place: Place, module: str, function: str) -> None:
    program = f"""
        import types
        patched = types.ModuleType({module!r})
        patched.{function} = lambda name: True
        sys.modules[{module!r}] = patched
        try:
            blocking.Client(address, group=group).send(message())
        except RuntimeError as error:
            print(error)
    """
    assert run_program(program, place) == [
        "kiteq_client.blocking needs real threads: it does not work with gevent or eventlet"
    ]
