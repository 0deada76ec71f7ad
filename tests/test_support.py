"""The broker process that other tests rely on, itself tested."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import Hello, Packet, Refusal, Welcome
from tests.support.broker import BrokerFailed, BrokerProcess, free_port, greet


@contextmanager
def answering(frame: bytes) -> Iterator[tuple[int, list[Packet]]]:
    """Serve one connection: read a greeting, send `frame`, close."""
    heard: list[Packet] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            decoder = Decoder(65_536)
            while not heard:
                heard.extend(decoder.feed(connection.recv(65_536)))
            connection.sendall(frame)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], heard
        thread.join()


def test_greet_returns_the_welcome() -> None:
    welcome = Welcome(1, 1, "broker-1", {"body_bytes": 1}, True)
    with answering(encode_packet(welcome)) as (port, heard):
        assert greet("127.0.0.1", port) == welcome
    assert isinstance(heard[0], Hello)
    assert heard[0].bindings == []


def test_greet_tells_the_reason_of_a_refusal() -> None:
    refusal = Refusal(0, "busy", "too many connections", True)
    with answering(encode_packet(refusal)) as (port, _), pytest.raises(BrokerFailed, match="too many connections"):
        greet("127.0.0.1", port)


def test_greet_of_a_closed_connection_is_an_os_error() -> None:
    with answering(b"") as (port, _), pytest.raises(ConnectionResetError):
        greet("127.0.0.1", port)


def test_greet_without_a_listener_is_an_os_error() -> None:
    with pytest.raises(ConnectionRefusedError):
        greet("127.0.0.1", free_port())


@pytest.mark.slow
def test_a_broker_that_ends_at_start_shows_its_log(tmp_path: Path) -> None:
    broker = BrokerProcess(tmp_path, "--no-such-flag")
    with pytest.raises(BrokerFailed, match=r"ended with status [12] at start; its log:\n.+"):
        broker.start()
    assert not broker.is_running
