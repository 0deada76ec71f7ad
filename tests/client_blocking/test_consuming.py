"""Receiving without `async`: handlers in threads, their time limit, deliveries, and `run`."""

from __future__ import annotations

import signal
import threading

import pytest

from kiteq_client import ClientClosed, Received, Reject, RetryAfter, fanout
from kiteq_client.blocking import Delivery, Handlers
from tests.client_blocking.parts import Place, Running, started, until


def test_one_thread_handles_in_order(place: Place) -> None:
    got: list[bytes] = []
    threads = set()

    def handle(message: Received) -> None:
        threads.add(threading.get_ident())
        got.append(message.body)

    with place.client(bindings=[fanout(place.topic)], on_message=handle) as client:
        bodies = [b"%d" % number for number in range(300)]
        client.send_many([place.message(body) for body in bodies])
        until(lambda: len(got) == 300)
    assert got == bodies
    assert len(threads) == 1


def test_as_many_threads_as_concurrency_handle_at_once(place: Place) -> None:
    together = threading.Barrier(4, timeout=20)
    threads = set()

    def handle(_: Received) -> None:
        threads.add(threading.get_ident())
        together.wait()

    with place.client(bindings=[fanout(place.topic)], on_message=handle, concurrency=4) as client:
        client.send_many([place.message() for _ in range(40)])
        until(lambda: client.statistics().acked == 40)
    assert len(threads) == 4


def test_handlers_are_found_by_topic_and_type(place: Place) -> None:
    handlers = Handlers()
    got: list[tuple[str, str]] = []

    @handlers.on(place.topic, "pay")
    def exact(message: Received) -> None:
        got.append(("exact", message.message_type))

    @handlers.on(place.topic)
    def rest(message: Received) -> None:
        got.append(("rest", message.message_type))

    with place.client(bindings=[fanout(place.topic)], handlers=handlers) as client:
        client.send(place.message())
        client.send(type(place.message())(place.topic, "other"))
        until(lambda: len(got) == 2)
    assert got == [("exact", "pay"), ("rest", "other")]
    with pytest.raises(ValueError, match="already"):
        handlers.on(place.topic)(exact)
    assert handlers.find("elsewhere", "pay") is None


def test_what_a_handler_raises_says_what_becomes_of_the_message(place: Place) -> None:
    attempts: list[tuple[str, int]] = []

    def handle(message: Received) -> None:
        attempts.append((message.text, message.attempt))
        if message.text == "rejected":
            raise Reject("never")
        if message.attempt == 1:
            raise {"later": RetryAfter(0.01), "fails": KeyError("not yet"), "exits": SystemExit(1)}[message.text]

    with place.client(bindings=[fanout(place.topic)], on_message=handle) as client:
        client.send_many([place.message(text) for text in ("rejected", "later", "fails", "exits")])
        until(lambda: {("later", 2), ("fails", 2), ("exits", 2)} <= set(attempts))
        until(lambda: client.statistics().acked == 3)
    assert [text for text, _ in attempts].count("rejected") == 1


def test_async_functions_are_refused_by_name(place: Place) -> None:
    async def handle(message: Received) -> None:
        raise AssertionError

    with pytest.raises(TypeError, match=r"`async def`: kiteq_client\.blocking takes plain functions"):
        place.client(on_message=handle)
    with pytest.raises(TypeError, match="async def"):
        Handlers().on("trade")(handle)
    with pytest.raises(TypeError, match="must be a function"):
        Handlers().on("trade", "pay")(None)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="not both"):
        place.client(on_message=print, handlers=Handlers())


def test_a_function_that_returns_a_coroutine_does_not_ack(place: Place) -> None:
    attempts: list[int] = []

    async def work() -> None:
        raise AssertionError

    def handle(message: Received) -> object:
        attempts.append(message.attempt)
        return work() if message.attempt == 1 else None

    with place.client(bindings=[fanout(place.topic)], on_message=handle) as client:
        client.send(place.message())
        until(lambda: client.statistics().acked == 1)
    assert attempts == [1, 2]


def test_a_handler_that_runs_too_long_is_nacked_and_its_result_ignored(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()
    got: list[tuple[str, int]] = []

    def handle(message: Received) -> None:
        got.append((message.text, message.attempt))
        if message.text == "slow" and message.attempt == 1:
            over.wait()

    with place.client(bindings=[fanout(place.topic)], on_message=handle, handler_timeout=0.2) as client:
        client.send_many([place.message("slow"), place.message("quick")])
        until(lambda: client.statistics().acked == 2)
        assert client.statistics().nacked == 1
        assert "its thread cannot be stopped, and its result will be ignored" in caplog.text
        over.set()
        until(lambda: "its result is ignored" in caplog.text)
        assert (client.statistics().acked, client.statistics().nacked) == (2, 1)
    assert set(got) == {("slow", 1), ("slow", 2), ("quick", 1)}


def test_a_handler_may_send_but_not_close(place: Place) -> None:
    refused: list[str] = []
    done = threading.Event()

    def handle(message: Received) -> None:
        if message.text == "first":
            client.send(place.message("second"))
            try:
                client.close()
            except RuntimeError as error:
                refused.append(str(error))
        else:
            done.set()

    with place.client(bindings=[fanout(place.topic)], on_message=handle) as client:
        client.send(place.message("first"))
        until(done.is_set)
    assert refused == ["a handler must not close the client that waits for it"]


def test_closing_lets_the_running_handler_finish(place: Place) -> None:
    began, over, done = threading.Event(), threading.Event(), threading.Event()

    def handle(_: Received) -> None:
        began.set()
        over.wait()
        done.set()

    with place.client(bindings=[fanout(place.topic)], on_message=handle) as client:
        client.send(place.message())
        until(began.is_set)
        threading.Timer(0.1, over.set).start()
    assert done.is_set()
    with place.client() as client:
        assert client.admin("group.show", group=place.group) is not None
        client.send(place.message("last"))
        assert next(iter(client.deliveries())).text == "last"


def test_deliveries_are_acked_nacked_and_rejected(place: Place) -> None:
    with place.client(bindings=[fanout(place.topic)]) as client:
        client.send_many([place.message(text, properties={"a": "b"}) for text in ("good", "bad", "ugly", "left")])
        seen: list[tuple[str, int]] = []
        for delivery in client.deliveries():
            seen.append((delivery.text, delivery.attempt))
            if delivery.text == "good":
                assert (delivery.topic, delivery.message_type, delivery.group) == (place.topic, "pay", place.group)
                assert (delivery.body, delivery.properties, delivery.id) == (b"good", {"a": "b"}, delivery.message.id)
                assert delivery.created_at > 0
                assert repr(delivery).startswith("Delivery(Received(")
                delivery.ack()
                with pytest.raises(RuntimeError, match="answered already"):
                    delivery.ack()
            elif delivery.text == "bad":
                delivery.reject("cannot be handled")
            elif delivery.attempt == 1:
                delivery.nack("again")
            elif delivery.text == "ugly":
                delivery.ack()
                break
            else:
                pytest.fail(f"unexpected {delivery}")
            if len(seen) == 3:
                break
        assert seen == [("good", 1), ("bad", 1), ("ugly", 1)]
        rest = {}
        for delivery in client.deliveries():
            rest[delivery.text] = delivery.attempt
            delivery.ack()
            if len(rest) == 2:
                break
        assert rest == {"ugly": 2, "left": 1}


def test_several_threads_share_one_iterator(place: Place) -> None:
    with place.client(bindings=[fanout(place.topic)]) as client:
        client.send_many([place.message(b"%d" % number) for number in range(200)])
        deliveries = client.deliveries()
        got: list[bytes] = []

        def take(_: int) -> None:
            for delivery in deliveries:
                delivery.ack()
                got.append(delivery.body)

        taking = Running(take, 4)
        until(lambda: len(got) == 200)
    taking.wait()
    assert {type(error) for error in taking.errors.values()} == {ClientClosed}
    assert sorted(got) == sorted(b"%d" % number for number in range(200))


def test_a_closed_iterator_ends(place: Place) -> None:
    with place.client(bindings=[fanout(place.topic)]) as client:
        client.send(place.message())
        deliveries = client.deliveries()
        delivery = next(deliveries)
        assert isinstance(delivery, Delivery)
        deliveries.close()
        assert list(deliveries) == []
        delivery.ack()
        until(lambda: client.statistics().acked == 1)


def test_deliveries_and_handlers_exclude_each_other(place: Place) -> None:
    with place.client(on_message=print) as client, pytest.raises(RuntimeError, match="has handlers"):
        client.deliveries()
    with place.client() as client, pytest.raises(RuntimeError, match="run"):
        client.run()


def test_run_in_a_thread_returns_when_the_client_is_closed(place: Place) -> None:
    got = threading.Event()
    client = place.client(bindings=[fanout(place.topic)], on_message=lambda _: got.set())
    running = Running(lambda _: client.run())
    client.send(place.message())
    until(got.is_set)
    client.close()
    running.join()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_returns_at_a_signal_and_leaving_finishes_the_handler(place: Place, number: signal.Signals) -> None:
    program = """
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        def handle(message):
            while signal.getsignal(signal.SIGTERM) == before[0]:
                time.sleep(0.001)  # run() is not yet called
            print("ready")
            time.sleep(0.5)
            print("handled")
        with blocking.Client(address, group=group, bindings=[fanout(topic)], on_message=handle) as client:
            client.send(message())
            client.run()
            print("running is over")
            assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
        print("left")
    """
    with started(program, place) as process:
        process.send_signal(number)
        assert process.communicate(timeout=20) == ("running is over\nhandled\nleft\n", "")
        assert process.returncode == 0


def test_a_handler_that_never_returns_does_not_keep_the_interpreter(place: Place) -> None:
    program = """
        stuck = threading.Event()
        def handle(message):
            stuck.set()
            threading.Event().wait()
        client = blocking.Client(
            address, group=group, bindings=[fanout(topic)], on_message=handle, handler_timeout=0.2
        )
        client.send(message(b"stuck"))
        stuck.wait()
        while client.statistics().nacked == 0:
            time.sleep(0.01)
        print("ready")
    """
    with started(program, place) as process:
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0


def test_iterating_survives_an_interrupt_without_losing_a_message(place: Place) -> None:
    program = """
        with blocking.Client(address, group=group, bindings=[fanout(topic)]) as client:
            deliveries = client.deliveries()
            print("ready")
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            try:
                next(deliveries)
            except KeyboardInterrupt:
                client.send(message("after"))
                delivery = next(deliveries)
                delivery.ack()
                print(delivery.text)
    """
    with started(program, place) as process:
        assert process.communicate(timeout=20) == ("after\n", "")


def test_what_an_interrupted_call_took_is_given_out_next_or_goes_back(place: Place) -> None:
    with place.client(bindings=[fanout(place.topic)]) as client:
        client.send_many([place.message("one"), place.message("two")])
        deliveries = client.deliveries()
        deliveries._portal.call(deliveries._take)  # as if the interrupt came before its result was there
        delivery = next(deliveries)
        assert delivery.text == "one"
        delivery.ack()
        deliveries._portal.call(deliveries._take)
        deliveries.close()
        again = next(iter(client.deliveries()))
        assert (again.text, again.attempt) == ("two", 2)


def test_a_handler_that_ends_after_the_client_left_ends_its_thread(place: Place) -> None:
    over = threading.Event()
    got: list[str] = []

    def handle(message: Received) -> None:
        got.append(message.text)
        over.wait()

    with place.client() as other:  # keeps the event loop thread
        with place.client(bindings=[fanout(place.topic)], on_message=handle, handler_timeout=0.2) as client:
            client.send(place.message("slow"))
            until(lambda: client.statistics().nacked > 0)
            client.unsubscribe(fanout(place.topic))
        over.set()
        until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("kiteq-handler")])
        assert other.send(place.message()).durable
    assert set(got) == {"slow"}
