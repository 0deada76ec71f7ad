"""The bounds of the HTTP port, with applications that behave worse than ours."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs
from trio.testing import MockClock

from kiteq.admin import server, views
from tests.admin.http import answering, get, port_open, read_answer, serving
from tests.e2e.wire import PATIENCE_SECONDS

LARGE = b"x" * (16 << 20)
"""More than the buffers of two sockets hold."""


@pytest.fixture
def hurried() -> MockClock:
    return MockClock(rate=1)


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"here"})


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": LARGE})


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise LookupError("a defect")


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    await trio.sleep_forever()


async def test_a_defect_is_answered_with_500_and_logged() -> None:
    with capture_logs() as logs:
        async with answering(views.bounded(broken)) as address:
            assert (await get(address, "/stat")).status == 500
            assert (await get(address, "/stat")).status == 500
    assert [(one["event"], one["path"]) for one in logs] == [("an HTTP request failed", "/stat")] * 2


async def test_an_answer_that_takes_too_long_is_given_up(hurried: MockClock) -> None:
    async with answering(views.bounded(endless)) as address, port_open(address) as stream:
        await stream.send_all(b"GET /stat HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
        await trio.sleep(0.2)
        hurried.jump(views.ANSWER_SECONDS_MAX)
        answer = await read_answer(stream)
    assert (answer.status, answer.json) == (503, {"error": "this takes too long now"})


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nhost: h\r\nx: "])
async def test_a_connection_that_does_not_finish_its_question_is_closed(hurried: MockClock, sent: bytes) -> None:
    async with answering(plain) as address, port_open(address) as stream:
        if sent:
            await stream.send_all(sent)
        await trio.sleep(0.2)
        hurried.jump(server.IDLE_SECONDS_MAX)
        with trio.fail_after(PATIENCE_SECONDS):
            assert await stream.receive_some() == b""


async def test_a_head_that_is_too_long_is_refused() -> None:
    async with answering(plain) as address:
        answer = await get(address, "/healthz", "x: " + "y" * 200_000)
        assert answer.status == 431
        assert (await get(address, "/healthz", "x: " + "y" * 1_000)).body == b"here"


@pytest.mark.parametrize("rubbish", [b"\x16\x03\x01\x02\x00", b"kiteq\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100])
async def test_rubbish_costs_its_own_connection_only(rubbish: bytes) -> None:
    async with serving("memory://") as (_, address):
        async with port_open(address) as stream:
            await stream.send_all(rubbish)
            await stream.send_eof()
            with trio.fail_after(PATIENCE_SECONDS):
                while await stream.receive_some():
                    pass
        assert (await get(address, "/healthz")).status == 200


async def test_a_reader_that_takes_nothing_is_cut_off(hurried: MockClock) -> None:
    async with answering(large) as address, port_open(address) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
        await trio.sleep(0.5)
        hurried.jump(server.WRITE_SECONDS_MAX)
        await trio.sleep(0.5)
        received = 0
        with trio.fail_after(PATIENCE_SECONDS):
            try:
                while chunk := await stream.receive_some():
                    received += len(chunk)
            except trio.BrokenResourceError:
                pass
    assert received < len(LARGE)


async def test_a_large_answer_arrives_whole() -> None:
    async with answering(large) as address:
        assert (await get(address, "/")).body.count(b"x") == len(LARGE)


async def test_an_answer_that_is_not_read_does_not_hold_up_the_end() -> None:
    with trio.fail_after(PATIENCE_SECONDS / 2):
        async with answering(large) as address, port_open(address) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
            await stream.receive_some(1)


async def test_more_connections_than_allowed_wait_for_a_place(
    hurried: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 1)
    async with answering(plain) as address, port_open(address):
        await trio.sleep(0.1)  # until it is accepted
        async with trio.open_nursery() as nursery:
            answered = trio.Event()

            async def second() -> None:
                assert (await get(address, "/")).status == 200
                answered.set()

            nursery.start_soon(second)
            await trio.sleep(0.1)
            assert not answered.is_set()
            hurried.jump(server.IDLE_SECONDS_MAX)
            with trio.fail_after(PATIENCE_SECONDS):
                await answered.wait()


async def test_a_defect_of_a_connection_is_logged_and_costs_that_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            raise LookupError("a defect")

    async with answering(plain) as address:
        with monkeypatch.context() as patched, capture_logs() as logs:
            patched.setattr(server, "TCPServer", Broken)
            async with port_open(address) as stream:
                with trio.fail_after(PATIENCE_SECONDS):
                    assert await stream.receive_some() == b""
        assert (await get(address, "/")).status == 200
    assert [one["event"] for one in logs] == ["an HTTP connection failed"]


async def test_an_error_of_accept_is_logged_and_tried_again() -> None:
    class Exhausted:
        def __init__(self) -> None:
            self.errors = [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOBUFS, "No buffer space")]

        async def accept(self) -> str:
            if self.errors:
                raise self.errors.pop(0)
            return "a connection"

    listener: Any = Exhausted()
    with capture_logs() as logs:
        accepted: Any = await server._accept(listener)
    assert accepted == "a connection"
    assert [one["reason"] for one in logs] == ["Too many open files", "No buffer space"]


async def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    async with answering(broken) as address:
        await get(address, "/")
    async with serving("memory://") as (_, address):
        await get(address, "/stat")
        await get(address, "/nothing")
    printed = capfd.readouterr()
    assert "hypercorn" not in printed.out + printed.err
    assert "GET" not in printed.out + printed.err
