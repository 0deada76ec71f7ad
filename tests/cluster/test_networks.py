"""The networks of these tests, themselves tested."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.namespaces import Network

ADDRESS = ("127.0.0.11", 4000)
QUIET_SECONDS = 0.2


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


def listen() -> socket.socket:
    return socket.create_server(ADDRESS)


def connect(timeout: float = 10.0) -> socket.socket:
    return socket.create_connection(ADDRESS, timeout)


def arrives(sender: socket.socket, receiver: socket.socket) -> bool:
    receiver.settimeout(QUIET_SECONDS)
    sender.sendall(b"x")
    try:
        return receiver.recv(1) == b"x"
    except TimeoutError:
        return False


def test_only_who_is_inside_reaches_a_port(network: Network) -> None:
    with network.inside(listen), pytest.raises(ConnectionRefusedError):
        connect()
    with network.inside(listen), network.inside(connect):
        pass


def test_the_caller_stays_where_it_is(network: Network) -> None:
    before = Path("/proc/thread-self/ns/net").readlink()
    assert network.inside(Path("/proc/thread-self/ns/net").readlink) != before
    assert Path("/proc/thread-self/ns/net").readlink() == before


def test_an_error_inside_is_raised_outside(network: Network) -> None:
    with pytest.raises(ConnectionRefusedError):
        network.inside(connect)


def test_a_line_is_cut_in_one_direction_and_heals(network: Network) -> None:
    with network.inside(listen) as listener, network.inside(connect) as client:
        server, _ = listener.accept()
        with server:
            assert arrives(client, server)
            with network.cut(to=ADDRESS[0]):
                assert not arrives(client, server)
                assert arrives(server, client)
                with pytest.raises(TimeoutError):
                    network.inside(lambda: connect(QUIET_SECONDS))
            server.settimeout(10)
            assert server.recv(1) == b"x"
            with network.cut(answers_of=ADDRESS[0]):
                assert not arrives(server, client)
            client.settimeout(10)
            assert client.recv(1) == b"x"
            assert arrives(client, server)


def test_a_network_leaves_nothing_behind() -> None:
    handles = len(list(Path("/proc/self/fd").iterdir()))
    with Network():
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == handles
