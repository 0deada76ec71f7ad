"""Consuming, against a broker that delivers what the test wants."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from kiteq.remoting.packets import (
    NACK_FAILED,
    NACK_REJECTED,
    NACK_UNSTARTED,
    Ack,
    Credit,
    Deliver,
    Extend,
    Goodbye,
    Nack,
    Packet,
    Settled,
)
from kiteq_client import Client, Handlers, Message, Received, Reject, RetryAfter
from tests.client.peer import Connection, both_loops, peer, well


def message(body: bytes = b"x", message_type: str = "pay") -> Message:
    return Message("trade", message_type, body)


def delivering(
    *messages: Message | bytes, seen: list[Packet], ack_deadline_ms: int = 60_000
) -> Callable[[Connection], Awaitable[None]]:
    """A broker that delivers these once it has credit, and notes what it gets."""

    async def script(connection: Connection) -> None:
        await connection.accept(ack_deadline_ms=ack_deadline_ms)
        await connection.expect(Credit)
        await connection.deliver(*messages)
        await connection.serve(seen)

    return script


def acked(seen: list[Packet]) -> list[int]:
    return [
        tag
        for packet in seen
        if isinstance(packet, Ack)
        for first, last in zip(packet.ranges[::2], packet.ranges[1::2], strict=True)
        for tag in range(first, last + 1)
    ]


def nacked(seen: list[Packet]) -> list[list[Any]]:
    return [item for packet in seen if isinstance(packet, Nack) for item in packet.items]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 what the test waits for happens at the other end of a socket
        await anyio.sleep(0.002)


@both_loops
async def test_returning_acks_in_ranges_and_in_order() -> None:
    seen: list[Packet] = []
    got: list[bytes] = []

    async def handle(received: Received) -> None:
        got.append(received.body)
        assert (received.group, received.attempt) == ("g", 1)

    bodies = [b"%d" % number for number in range(50)]
    async with peer(delivering(*map(message, bodies), seen=seen)) as address:
        async with Client(address, group="g", on_message=handle) as client:
            await until(lambda: acked(seen))
            assert client.statistics().acked == 50
        assert got == bodies
        assert acked(seen) == list(range(1, 51))
        assert sum(isinstance(packet, Ack) for packet in seen) == 1
        await until(lambda: isinstance(seen[-1], Goodbye))


@both_loops
async def test_half_a_window_of_acks_is_sent_at_once() -> None:
    seen: list[Packet] = []

    async def handle(received: Received) -> None:
        if received.body == b"wait":
            await anyio.sleep_forever()

    async with peer(delivering(message(), message(), message(b"wait"), seen=seen)) as address:
        with anyio.move_on_after(1):
            async with Client(address, group="g", on_message=handle, prefetch=4, handler_timeout=0.1):
                await until(lambda: acked(seen) == [1, 2])
                await until(lambda: nacked(seen))


@both_loops
async def test_how_a_handler_ends_decides_the_answer() -> None:
    seen: list[Packet] = []
    handlers = Handlers()

    def failing(error: BaseException) -> Callable[[Received], Awaitable[None]]:
        async def fail(_received: Received) -> None:
            raise error

        return fail

    errors: dict[str, BaseException] = {
        "value": ValueError("no good"),
        "retry": RetryAfter(1.5),
        "reject": Reject("never"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
    }
    for name, error in errors.items():
        handlers.on("trade", name)(failing(error))

    @handlers.on("trade", "fine")
    async def fine(received: Received) -> None:
        pass

    damaged = bytearray(message().encoded())
    damaged[-1] ^= 1
    messages = [message(message_type=name) for name in [*errors, "unknown", "fine"]]
    async with (
        peer(delivering(*messages, bytes(damaged), seen=seen)) as address,
        Client(address, group="g", handlers=handlers),
    ):
        await until(lambda: acked(seen))
    assert acked(seen) == [7]
    assert nacked(seen) == [
        [1, NACK_FAILED, None, "ValueError: no good"],
        [2, NACK_FAILED, 1_500, "RetryAfter: 1.5 s"],
        [3, NACK_REJECTED, None, "never"],
        [4, NACK_FAILED, None, "SystemExit: 3"],
        [5, NACK_FAILED, None, "KeyboardInterrupt: "],
        [6, NACK_FAILED, None, "no handler for trade/unknown"],
        [8, NACK_REJECTED, None, "the checksum of a message does not match its bytes"],
    ]


def test_a_handler_that_meets_a_cancelled_task_of_its_own_is_a_failed_attempt() -> None:
    seen: list[Packet] = []

    async def handle(received: Received) -> None:
        if received.body == b"cancel":
            task = asyncio.ensure_future(asyncio.sleep(10))
            task.cancel()
            await task

    async def main() -> None:
        async with (
            peer(delivering(message(b"cancel"), message(), seen=seen)) as address,
            Client(address, group="g", on_message=handle),
        ):
            await until(lambda: acked(seen))

    anyio.run(main, backend="asyncio")
    assert acked(seen) == [2]
    assert [item[:2] for item in nacked(seen)] == [[1, NACK_FAILED]]


@both_loops
async def test_a_handler_that_hangs_is_cancelled_and_the_next_message_handled() -> None:
    seen: list[Packet] = []

    async def handle(received: Received) -> None:
        if received.body == b"hang":
            await anyio.sleep_forever()

    async with (
        peer(delivering(message(b"hang"), message(), message(b"hang"), message(), seen=seen)) as address,
        Client(address, group="g", on_message=handle, handler_timeout=0.05),
    ):
        await until(lambda: len(acked(seen)) == 2)
    assert acked(seen) == [2, 4]
    assert nacked(seen) == [
        [tag, NACK_FAILED, None, "TimeoutError: the handler ran longer than 0.05 s"] for tag in (1, 3)
    ]


@both_loops
async def test_concurrency_handlers_run_at_a_time() -> None:
    seen: list[Packet] = []
    running = most = 0

    async def handle(received: Received) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.002)
        running -= 1

    async with (
        peer(delivering(*(message() for _ in range(12)), seen=seen)) as address,
        Client(address, group="g", on_message=handle, concurrency=3),
    ):
        await until(lambda: len(acked(seen)) == 12)
    assert most == 3
    assert sorted(acked(seen)) == list(range(1, 13))


@both_loops
async def test_what_is_queued_or_running_is_extended_in_one_frame() -> None:
    seen: list[Packet] = []
    release = anyio.Event()

    async def handle(received: Received) -> None:
        await release.wait()

    async with (
        peer(delivering(message(), message(), message(), seen=seen, ack_deadline_ms=90)) as address,
        Client(address, group="g", on_message=handle),
    ):
        await until(lambda: sum(isinstance(packet, Extend) for packet in seen) >= 2)
        release.set()
        await until(lambda: len(acked(seen)) == 3)
    assert [packet.ranges for packet in seen if isinstance(packet, Extend)][:2] == [[1, 3], [1, 3]]
    assert acked(seen) == [1, 2, 3]


@both_loops
async def test_leaving_finishes_the_handler_hands_back_the_rest_and_waits_for_the_confirmation() -> None:
    seen: list[Packet] = []
    started = anyio.Event()
    settled = False

    async def script(connection: Connection) -> None:
        nonlocal settled
        await connection.accept()
        assert (await connection.expect(Credit)).window == 256
        await connection.deliver(message(), message(), message())
        assert (await connection.expect(Credit)).window == 0
        await connection.deliver(message(), first_tag=4)
        while not isinstance(packet := await connection.receive(), Goodbye):
            assert not settled or isinstance(packet, Nack | Ack)
            seen.append(packet)
            await anyio.sleep(0.02)
            settled = True
            await connection.send(Settled(packet.request, []))
        assert settled

    async def handle(received: Received) -> None:
        started.set()
        await anyio.sleep(0.03)

    async with peer(script) as address:
        async with Client(address, group="g", on_message=handle):
            await started.wait()
        assert settled
        assert acked(seen) == [1]
        assert sorted(item[:2] for item in nacked(seen)) == [[tag, NACK_UNSTARTED] for tag in (2, 3, 4)]


@both_loops
async def test_what_a_lost_connection_delivered_is_neither_handled_nor_acked_on_the_next() -> None:
    seen: list[Packet] = []
    started, lost = anyio.Event(), anyio.Event()
    got: list[bytes] = []

    async def drop(connection: Connection) -> None:
        await connection.accept()
        await connection.expect(Credit)
        await connection.deliver(message(b"one"), message(b"two"))
        await started.wait()
        await connection.stream.aclose()
        await anyio.sleep(0.01)
        lost.set()

    async def handle(received: Received) -> None:
        got.append(received.body)
        if received.body == b"one":
            started.set()
            await lost.wait()

    async with (
        peer(drop, delivering(message(b"again"), seen=seen)) as address,
        Client(address, group="g", on_message=handle),
    ):
        await until(lambda: acked(seen))
    assert got == [b"one", b"again"]
    assert acked(seen) == [1]


@both_loops
async def test_a_handler_may_send_while_the_client_leaves() -> None:
    seen: list[Packet] = []
    started = anyio.Event()

    async def handle(received: Received) -> None:
        started.set()
        await anyio.sleep(0.02)
        await client.send(message())

    async with (
        peer(delivering(message(), seen=seen)) as address,
        Client(address, group="g", on_message=handle) as client,
    ):
        await started.wait()
    assert acked(seen) == [1]


@both_loops
async def test_deliveries_are_answered_one_by_one() -> None:
    seen: list[Packet] = []
    async with (
        peer(delivering(*(message(b"%d" % n) for n in range(6)), seen=seen)) as address,
        Client(address, group="g") as client,
    ):
        async for delivery in client.deliveries():
            match delivery.text:
                case "0":
                    await delivery.ack()
                    with pytest.raises(RuntimeError, match="already"):
                        await delivery.ack()
                    with pytest.raises(RuntimeError, match="iterated already"):
                        await client.deliveries().__anext__()
                case "1":
                    await delivery.nack("later", after=2)
                case "2":
                    await delivery.reject("never")
                case "3":
                    break
        await until(lambda: len(nacked(seen)) == 4)
        assert any(isinstance(packet, Credit) and packet.window == 0 for packet in seen)
        assert (delivery.topic, delivery.message_type, delivery.attempt) == ("trade", "pay", 1)
        await delivery.ack()
    assert acked(seen) == [1, 4]
    assert sorted(nacked(seen)) == [
        [2, NACK_FAILED, 2_000, "later"],
        [3, NACK_REJECTED, None, "never"],
        [5, NACK_UNSTARTED, None, ""],
        [6, NACK_UNSTARTED, None, ""],
    ]


@both_loops
async def test_handlers_and_deliveries_exclude_each_other() -> None:
    async def handle(received: Received) -> None:
        pass

    async with (
        peer(well) as address,
        Client(address, group="g", on_message=handle) as client,
        Client(address, group="g") as other,
    ):
        with pytest.raises(RuntimeError, match="handlers"):
            client.deliveries()
        with pytest.raises(RuntimeError, match="handlers"):
            await other.run()


@both_loops
async def test_run_ends_at_sigterm() -> None:
    async def handle(received: Received) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async with (
        peer(delivering(message(), seen=[])) as address,
        Client(address, group="g", on_message=handle) as client,
    ):
        await client.run()


@both_loops
async def test_deliveries_that_do_not_fit_the_protocol_end_the_connection() -> None:
    seen: list[Packet] = []

    async def bad(connection: Connection) -> None:
        await connection.accept()
        await connection.expect(Credit)
        await connection.send(Deliver(0, 1, [1, 1], [message().encoded()]))
        await connection.receive()

    async def handle(received: Received) -> None:
        pass

    async with (
        peer(bad, delivering(message(), seen=seen)) as address,
        Client(address, group="g", on_message=handle),
    ):
        await until(lambda: acked(seen))
