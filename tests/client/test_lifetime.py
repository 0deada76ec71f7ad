"""Entering and leaving: what passes through `async with`, and what does not."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from kiteq.remoting.packets import (
    Admin,
    AdminReply,
    Goodbye,
    Hello,
    Ping,
    Refusal,
    Subscribe,
    Subscribed,
    Unsubscribe,
    Welcome,
)
from kiteq_client import Client, ClientClosed, Message, NotConnected, Received, Refused, SendTimeout, direct, fanout
from tests.client.parts import OwnError
from tests.client.peer import LIMITS, Connection, both_loops, peer, well


@both_loops
async def test_an_exception_of_the_body_leaves_as_itself() -> None:
    async with peer(well) as address:
        error = OwnError("mine")
        with pytest.raises(OwnError) as caught:
            async with Client(address, group="g"):
                raise error
        assert caught.value is error
        assert caught.value.__context__ is None


@both_loops
async def test_a_group_raised_by_the_body_is_not_wrapped_again() -> None:
    async with peer(well) as address:
        group = ExceptionGroup("mine", [OwnError()])
        with pytest.raises(ExceptionGroup) as caught:
            async with Client(address, group="g"):
                raise group
        assert caught.value is group


@both_loops
async def test_a_cancelled_body_still_finishes_its_handlers() -> None:
    answered: list[bytes] = []
    started = anyio.Event()

    async def script(connection: Connection) -> None:
        await connection.accept()
        await connection.receive()
        await connection.deliver(Message("trade", "pay"))
        await connection.serve()

    async def handle(received: Received) -> None:
        started.set()
        await anyio.sleep(0.03)
        answered.append(received.id)

    async with peer(script) as address:
        with anyio.CancelScope() as scope:
            async with Client(address, group="g", on_message=handle) as client, anyio.create_task_group() as tasks:

                async def cancel() -> None:
                    await started.wait()
                    scope.cancel()

                tasks.start_soon(cancel)
                await client.run()
        assert scope.cancelled_caught
        assert len(answered) == 1
        assert client.statistics().acked == 1


@both_loops
async def test_a_deadline_around_the_client_is_a_timeout_error_and_no_group() -> None:
    async with peer(well) as address:
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.05):
                async with Client(address, group="g"):
                    await anyio.sleep_forever()


@both_loops
async def test_a_deadline_while_entering_is_kept() -> None:
    async def silent(connection: Connection) -> None:
        await anyio.sleep_forever()

    async with peer(silent) as address:
        with anyio.move_on_after(0.05) as scope:
            async with Client(address, group="g"):
                raise AssertionError
        assert scope.cancelled_caught
        with pytest.raises(NotConnected, match="within"):
            async with Client(address, group="g", timeout=0.05):
                raise AssertionError


@both_loops
async def test_a_background_failure_is_raised_by_later_calls_and_does_not_cancel_the_body() -> None:
    async def handle(received: Received) -> None:
        pass

    async def fail() -> None:
        raise OwnError("behind the scenes")

    async with peer(well) as address, Client(address, group="g", on_message=handle) as client:
        await client._guarded(fail)
        await anyio.sleep(0.01)
        with pytest.raises(OwnError):
            await client.send(Message("trade", "pay"))
        with pytest.raises(OwnError):
            await client.run()


@both_loops
async def test_leaving_in_another_task_is_a_clear_error() -> None:
    async with peer(well) as address, Client(address, group="g") as client, anyio.create_task_group() as tasks:

        async def leave() -> None:
            with pytest.raises(RuntimeError, match="left by the task that entered"):
                await client.__aexit__(None, None, None)

        tasks.start_soon(leave)


@both_loops
async def test_bindings_and_administration_are_requests() -> None:
    asked: list[object] = []

    async def script(connection: Connection) -> None:
        await connection.accept()
        subscribe = await connection.expect(Subscribe)
        assert subscribe.bindings[0][:3] == ["trade", 2, "*"]
        await connection.send(Subscribed(subscribe.request))
        unsubscribe = await connection.expect(Unsubscribe)
        assert unsubscribe[1:] == ("trade", 0, "pay")
        await connection.send(Subscribed(unsubscribe.request))
        admin = await connection.expect(Admin)
        asked.append(admin[1:])
        await connection.send(AdminReply(admin.request, [{"group": "g"}]))
        admin = await connection.expect(Admin)
        await connection.send(Refusal(admin.request, "unknown_verb", "what?", temporary=False))
        await connection.expect(Admin)
        await connection.serve()

    async def reconnected(connection: Connection) -> None:
        await connection.accept()
        assert connection.hello is not None
        asked.append(connection.hello.bindings)
        await connection.serve()

    async with (
        peer(script, reconnected) as address,
        Client(address, group="g", bindings=[direct("trade", "pay")], timeout=0.1) as client,
    ):
        await client.subscribe(fanout("trade"))
        await client.unsubscribe(direct("trade", "pay"))
        assert await client.admin("group.show", group="g") == [{"group": "g"}]
        with pytest.raises(Refused, match="what"):
            await client.admin("nonsense")
        with pytest.raises(SendTimeout):
            await client.admin("slow")
    assert asked == [("group.show", {"group": "g"})]


@both_loops
async def test_a_reconnected_client_brings_its_present_bindings() -> None:
    hellos: list[list[list[object]]] = []
    again = anyio.Event()

    async def script(connection: Connection) -> None:
        await connection.accept()
        subscribe = await connection.expect(Subscribe)
        await connection.send(Subscribed(subscribe.request))

    async def reconnected(connection: Connection) -> None:
        await connection.accept()
        assert connection.hello is not None
        hellos.append(connection.hello.bindings)
        again.set()
        await connection.serve()

    async with peer(script, reconnected) as address, Client(address, group="g") as client:
        await client.subscribe(fanout("trade"))
        await again.wait()
    assert [binding[:3] for binding in hellos[0]] == [["trade", 2, "*"]]


@both_loops
async def test_a_peer_that_says_nothing_is_left() -> None:
    connections = 0
    enough = anyio.Event()

    async def silent(connection: Connection) -> None:
        nonlocal connections
        await connection.accept(heartbeat_ms=20, idle_ms=40)
        connections += 1
        if connections == 2:
            enough.set()
        await anyio.sleep_forever()

    async with peer(silent) as address, Client(address, group="g"):
        await enough.wait()


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefetch": 0},
        {"concurrency": 0},
        {"max_in_flight": 0},
        {"timeout": 0},
        {"handler_timeout": -1},
        {"warm_up": -1},
        {"topics": "trade"},
        {"topics": ["no good"]},
        {"group": ""},
        {"registry": "http://localhost"},
    ],
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, object]) -> None:
    settings: dict[str, object] = {"registry": "localhost:1", "group": "g"}
    with pytest.raises(ValueError):
        Client(**(settings | wrong))  # type: ignore[arg-type]


def test_a_plain_function_is_no_handler() -> None:
    with pytest.raises(TypeError, match="async def"):
        Client("localhost:1", group="g", on_message=print)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["timeout", "cancel"])
def test_cancellation_by_asyncio_itself_passes_through(by: str) -> None:
    async def main() -> None:
        async with peer(well) as address:

            async def body() -> None:
                async with Client(address, group="g"):
                    await asyncio.sleep(10)

            task = asyncio.ensure_future(body())
            if by == "timeout":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await task
            else:
                await asyncio.sleep(0.05)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    anyio.run(main, backend="asyncio")


def test_asyncio_timeout_around_a_client_is_a_timeout_error() -> None:
    async def main() -> None:
        async with peer(well) as address:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), Client(address, group="g"):
                    await asyncio.sleep(10)

    anyio.run(main, backend="asyncio")


@both_loops
async def test_a_client_that_left_says_nothing_more_to_a_broker_that_leaves_too() -> None:
    received: list[object] = []

    async def leaving(connection: Connection) -> None:
        await connection.accept()
        await connection.expect(Goodbye)
        await connection.send(Goodbye(0, "maintenance"), Ping(1))  # they met on the way
        with anyio.move_on_after(0.1):
            received.append(await connection.receive())

    async with peer(leaving) as address:
        async with Client(address, group="g") as client:
            pass
        with pytest.raises(ClientClosed):
            await client.send(Message("t", "a"))
    assert received == []


@both_loops
async def test_leaving_one_broker_earlier_than_another_does_not_connect_to_it_again() -> None:
    connections = 0

    async def quick(connection: Connection) -> None:
        nonlocal connections
        connections += 1
        await connection.accept()
        await connection.serve()

    async def slow(connection: Connection) -> None:
        await connection.accept(broker="b2")
        await connection.serve()
        await anyio.sleep(0.2)  # longer than the wait before another attempt

    async with peer(quick) as first, peer(slow) as second, Client(f"kiteq://{first},{second}", group="g"):
        pass
    assert connections == 1


@both_loops
async def test_a_broker_that_accepts_while_the_client_leaves_is_told_goodbye_at_once() -> None:
    greeted, leaving, over = anyio.Event(), anyio.Event(), anyio.Event()
    told: list[object] = []

    async def first(connection: Connection) -> None:
        await connection.accept()
        await connection.serve()
        leaving.set()
        await over.wait()

    async def slow(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        greeted.set()
        await leaving.wait()
        await connection.send(Welcome(hello.request, 1, "b2", LIMITS, admin=True))
        told.append(await connection.receive())
        over.set()

    async with peer(first) as one, peer(slow) as two, Client(f"kiteq://{one},{two}", group="g"):
        await greeted.wait()
    assert [type(packet) for packet in told] == [Goodbye]
