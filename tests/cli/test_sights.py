"""Asking a broker again and again, against one that a script answers for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from kiteq import limits
from kiteq.cli import sights
from kiteq.cli.session import AdminSession
from kiteq.cli.sights import Watch
from kiteq.remoting.codec import Decoder, encode_packet
from kiteq.remoting.packets import Admin, AdminReply, Hello, Welcome


class Hanging:
    """A broker that answers one question for each connection, and nothing any more once `hangs` is set."""

    def __init__(self, listener: socket.socket) -> None:
        self.connections = 0
        self.hangs = False
        self._listener = listener
        self.streams: list[socket.socket] = []

    def serve(self) -> None:
        with suppress(OSError):  # the test is over
            while True:
                stream, _ = self._listener.accept()
                self.connections += 1
                self.streams.append(stream)
                if not self.hangs:
                    self._answer(stream)

    def _answer(self, stream: socket.socket) -> None:
        decoder = Decoder(1 << 20)
        while True:
            for packet in decoder.feed(stream.recv(1 << 16)):
                if isinstance(packet, Hello):
                    stream.sendall(encode_packet(Welcome(packet.request, 1, "b1", {}, admin=True)))
                elif isinstance(packet, Admin):
                    stream.sendall(encode_packet(AdminReply(packet.request, {"asked": packet.verb})))
                    return


@contextmanager
def hanging() -> Iterator[tuple[str, Hanging]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        broker = Hanging(listener)
        thread = threading.Thread(target=broker.serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", broker
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for stream in broker.streams:
                stream.close()


def test_a_broker_that_hangs_is_not_waited_for_twice_in_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    with hanging() as (address, broker), Watch(address) as watch:
        (sight,) = watch.look()
        assert sight.overview == {"asked": "overview"}
        broker.hangs = True
        monkeypatch.setattr(sights, "ANSWER_SECONDS_MAX", 0.2)
        watch._watched[address].session._socket.settimeout(0.2)  # type: ignore[union-attr]
        (sight,) = watch.look()
        assert (sight.overview, sight.state) == (None, "not reached")
        assert broker.connections == 1
        watch.look()
        assert broker.connections == 2


def test_a_broker_that_is_named_no_longer_and_not_reached_is_forgotten_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hanging() as (address, broker), Watch(address) as watch:
        broker.hangs = True
        monkeypatch.setattr(sights, "ANSWER_SECONDS_MAX", 0.1)
        assert len(watch.look()) == 1
        assert set(watch._take([])) == {address}
        monkeypatch.setattr(sights, "FORGET_SECONDS", -1.0)
        assert watch._take([]) == {}


def test_a_connection_that_was_silent_for_long_is_made_anew() -> None:
    with hanging() as (address, broker), AdminSession(address, answer_seconds=2.0) as session:
        assert session.ask("stat") == {"asked": "stat"}
        session._used_at -= limits.HEARTBEAT_SECONDS
        assert session.ask("overview") == {"asked": "overview"}
        assert broker.connections == 2
