"""Finding brokers through a real ZooKeeper: whom the client connects, what it brings, who gets what."""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import anyio
import pytest

from kiteq.message import decode
from kiteq.registry.layout import Server
from kiteq.registry.zookeeper import ZooKeeperRegistry, open_registry
from kiteq.remoting.packets import Hello, Publish, Subscribe
from kiteq_client import AuthenticationError, Client, Message, NotConnected, PartlySent, Received, Refused, direct
from kiteq_client.blocking import Client as BlockingClient
from kiteq_client.registry import Address
from tests.client.ledger import Ledger, warnings
from tests.client.peer import Connection, peer
from tests.registry.parts import SESSION_SECONDS, ListLog, expire
from tests.support.broker import free_port
from tests.support.zookeeper import ZooKeeperProcess

pytestmark = pytest.mark.slow

SECONDS_MAX = 30.0
Test = Callable[[str], Awaitable[None]]


@pytest.fixture(scope="module")
def zookeeper() -> Iterator[ZooKeeperProcess]:
    with ZooKeeperProcess() as process:
        yield process


def with_zookeeper(test: Test) -> Callable[[ZooKeeperProcess, str], None]:
    """Run an async test with the URL of a folder of its own, under asyncio and under trio."""

    @pytest.mark.parametrize("loop", ["asyncio", "trio"])
    def run(zookeeper: ZooKeeperProcess, loop: str) -> None:
        async def bounded() -> None:
            with anyio.fail_after(SECONDS_MAX):
                await test(f"zk://{zookeeper.address}/test-{uuid.uuid4().hex[:12]}")

        anyio.run(bounded, backend=loop)

    functools.update_wrapper(run, test)
    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would see the async function
    names = ("zookeeper", "loop")
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return run


async def until(condition: Callable[[], object]) -> None:
    """Wait for what happens in another process."""
    with anyio.fail_after(SECONDS_MAX / 2):
        while not condition():  # noqa: ASYNC110 there is no event for it
            await anyio.sleep(0.005)


class Announced:
    """A scripted broker and its announcement."""

    def __init__(self, name: str, url: str) -> None:
        self.ledger = Ledger(name)
        self.hellos: list[Hello] = []
        self.address = ""
        self.registry: ZooKeeperRegistry
        self._url = url
        self._epoch = 0

    async def script(self, connection: Connection) -> None:
        await connection.accept(broker=self.ledger.broker)
        assert connection.hello is not None
        self.hellos.append(connection.hello)
        await self.ledger.serve(connection)

    @asynccontextmanager
    async def running(self, *topics: str) -> AsyncIterator[None]:
        opened = open_registry(self._url, log=ListLog(), session_timeout=SESSION_SECONDS)
        async with peer(self.script) as self.address, opened as self.registry:
            await self.announce(*topics)
            yield

    async def announce(self, *topics: str) -> None:
        self._epoch += 1
        served = () if topics == ("*",) else topics
        await self.registry.announce(self.address, Server(self.ledger.broker, self._epoch, 1), served)

    def topics(self) -> set[str]:
        """Return the topics of what was published here."""
        blobs = [blob for packet in self.ledger.packets(Publish) for blob in packet.messages]
        return {decode(blob, "g", 1).topic for blob in blobs}

    def bodies(self, topic: str) -> list[bytes]:
        blobs = [blob for packet in self.ledger.packets(Publish) for blob in packet.messages]
        return [one.body for one in (decode(blob, "g", 1) for blob in blobs) if one.topic == topic]


def message(topic: str, body: bytes = b"x") -> Message:
    return Message(topic, "pay", body)


@with_zookeeper
async def test_entering_says_what_is_missing(url: str) -> None:
    with pytest.raises(NotConnected, match=f"no broker is announced for feed, trade in {url}"):
        async with Client(url, group="g", topics=["trade", "feed"], timeout=0.5):
            raise AssertionError
    with pytest.raises(NotConnected, match="no broker is announced in zk://"):
        async with Client(url, group="g", timeout=0.5):
            raise AssertionError
    away = f"zk://127.0.0.1:{free_port()}"
    with pytest.raises(NotConnected, match=f"the registry {away} was not reached: no connection"):
        async with Client(away, group="g", topics=["trade"], timeout=0.5):
            raise AssertionError
    async with Client(away, group="g", timeout=0.3, wait=False) as client:
        assert "not reached" in client.statistics().registry
        with pytest.raises(NotConnected, match="was not reached"):
            await client.send(message("trade"))
        await until(lambda: "no connection" in client.statistics().registry)


@with_zookeeper
async def test_each_broker_gets_the_topics_and_bindings_that_it_serves(url: str) -> None:
    trade, feed, every, other = (Announced(name, url) for name in ("b1", "b2", "b3", "b4"))
    bindings = [direct("feed", "pay"), direct("trade", "pay")]
    async with (
        trade.running("trade", "more"),
        feed.running("feed"),
        every.running("*"),
        other.running("other"),
        Client(url, group="g", topics=["trade"], bindings=bindings, on_message=_ignore) as client,
    ):
        await until(lambda: len(client.statistics().connected) == 3)
        said = {one.ledger.broker: one.hellos[0] for one in (trade, feed, every)}
        assert {name: hello.topics for name, hello in said.items()} == {"b1": ["trade"], "b2": [], "b3": ["trade"]}
        bound = {name: [binding[0] for binding in hello.bindings] for name, hello in said.items()}
        assert bound == {"b1": ["trade"], "b2": ["feed"], "b3": ["feed", "trade"]}
        assert not other.hellos
        assert client.statistics().registry == f"{url}: connected"

        messages = [message(("trade", "feed")[number % 2], b"%04d" % number) for number in range(2_000)]
        receipts = await client.send_many(messages)
        assert [receipt.message_id for receipt in receipts] == [one.id for one in messages]
        assert (trade.topics(), feed.topics(), every.topics()) == ({"trade"}, {"feed"}, {"trade", "feed"})
        for one, topic in ((trade, "trade"), (feed, "feed"), (every, "trade"), (every, "feed")):
            assert (got := one.bodies(topic)) == sorted(got)
            assert all(receipts[int(body)].broker == one.ledger.broker for body in got)

        # A topic not named before is one of the client's from then on.
        assert (await client.send_many([message("other")]))[0].broker in ("b3", "b4")
        await until(lambda: other.hellos)
        assert other.hellos[0].topics == ["other"]
        await client.subscribe(direct("other", "x"))
        await until(lambda: Subscribe in map(type, other.ledger.seen))  # or its connection brings it, just made


async def _ignore(_message: Received) -> None: ...


@with_zookeeper
async def test_brokers_come_and_go_while_the_client_runs(url: str) -> None:
    first, second = Announced("b1", url), Announced("b2", url)
    async with (
        first.running("trade"),
        Client(url, group="g", topics=["trade"], bindings=[direct("trade", "pay")], on_message=_ignore) as client,
    ):
        async with second.running("trade"):
            await until(lambda: len(client.statistics().connected) == 2)
            assert [binding[0] for binding in second.hellos[0].bindings] == ["trade"]
            await until(lambda: any(type(packet).__name__ == "Credit" for packet in second.ledger.seen))
            await client.send_many(message("trade") for _ in range(1_000))
            assert second.bodies("trade")

            # It serves one more topic: the binding is brought on the same connection.
            await second.announce("trade", "feed")
            await client.subscribe(direct("feed", "x"))
            await until(lambda: second.ledger.packets(Subscribe))

            # Gone from the registry: the connection stays as long as it lives.
            await second.registry.withdraw()
            await until(lambda: not client._brokers.diallers[_of(client, second)].listed)
            assert len(client.statistics().connected) == 2
            await second.ledger.connections[0].stream.aclose()
            await until(lambda: len(client._brokers.diallers) == 1)
            assert client.statistics().connected == (first.address,)
            assert len(second.hellos) == 1

            await second.announce("trade")
            await until(lambda: len(client.statistics().connected) == 2)
        assert (await client.send(message("trade"))).broker == "b1"


def _of(client: Client, announced: Announced) -> Address:
    return next(address for address in client._brokers.diallers if str(address) == announced.address)


@with_zookeeper
async def test_a_broker_that_starts_while_a_client_waits_hears_of_all_its_topics(url: str) -> None:
    broker = Announced("b1", url)
    topics = [f"topic-{number}" for number in range(20)]
    async with Client(url, group="g", topics=topics, wait=False) as client, broker.running(*topics):
        await until(lambda: client.statistics().connected and broker.hellos[-1].topics == topics)


@with_zookeeper
async def test_a_broker_that_is_announced_again_is_dialled_at_once(url: str) -> None:
    broker = Announced("b1", url)

    async def hang_up(_connection: Connection) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        # So long that nothing but the announcement explains a connection.
        patch.setattr("kiteq_client.dialler.RECONNECT_SECONDS_MIN", 1_000.0)
        patch.setattr("kiteq_client.dialler.RECONNECT_SECONDS_MAX", 1_000.0)
        async with (
            peer(hang_up, broker.script) as broker.address,
            open_registry(url, log=ListLog(), session_timeout=SESSION_SECONDS) as broker.registry,
            Client(url, group="g", topics=["trade"], wait=False) as client,
        ):
            await broker.announce("trade")
            await until(lambda: "closed" in client.statistics().not_reached.get(broker.address, ""))
            await broker.announce("trade")
            await until(lambda: client.statistics().connected)


@with_zookeeper
async def test_what_a_start_before_has_left_at_another_address_is_not_dialled(url: str) -> None:
    broker = Announced("b1", url)
    gone = f"127.0.0.1:{free_port()}"
    async with (
        open_registry(url, log=ListLog(), session_timeout=SESSION_SECONDS) as registry,
        Client(url, group="g", topics=["trade"], wait=False) as client,
    ):
        await registry.announce(gone, Server("b1", 0, 1), ["trade"])
        await until(lambda: client.statistics().not_reached)
        async with broker.running("trade"):
            await until(lambda: client.statistics().connected)
            await until(lambda: not client.statistics().not_reached)


@with_zookeeper
async def test_the_line_to_a_machine_that_is_dead_does_not_keep_its_broker_from_being_found_elsewhere(url: str) -> None:
    before, after = Announced("b1", url), Announced("b1", url)
    before.ledger.lose = lambda _packet: True  # the machine is gone, and no word of that comes
    async with (
        before.running("trade"),
        Client(url, group="g", topics=["trade"]) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(client.send, message("trade", b"first"))
        await until(lambda: before.bodies("trade"))
        after._epoch = 1
        async with after.running("trade"):
            await client.send(message("trade", b"second"))
            assert after.bodies("trade") == [b"first", b"second"]


@with_zookeeper
async def test_a_transaction_is_at_a_broker_that_serves_all_its_topics(url: str) -> None:
    trade, both, feed = (Announced(name, url) for name in ("b1", "b2", "b3"))
    async with trade.running("trade"), feed.running("feed"), Client(url, group="g", topics=["trade", "feed"]) as client:
        await until(lambda: len(client.statistics().connected) == 2)
        with pytest.raises(Refused, match="serves all topics of the transaction: feed, trade") as caught:
            async with client.transaction(message("trade"), message("feed")):
                raise AssertionError
        assert caught.value.code == "topic_not_served"
        async with client.transaction(message("trade")) as tx:
            with pytest.raises(Refused, match="not served by broker b1") as caught:
                await tx.add(message("feed"))
            assert caught.value.code == "topic_not_served"
            await tx.add(message("trade"))
        assert trade.ledger.committed == {tx.id}
        async with both.running("trade", "feed"):
            await until(lambda: len(client.statistics().connected) == 3)
            while True:  # its two topics are announced one after the other
                with suppress(Refused):
                    async with client.transaction(message("trade"), message("feed")) as tx:
                        await tx.add(message("feed"))
                    break
                await anyio.sleep(0.02)
            assert both.ledger.committed == {tx.id}
        assert not feed.ledger.handles


@with_zookeeper
async def test_nobody_for_one_topic_does_not_hold_up_the_others(url: str) -> None:
    broker = Announced("b1", url)
    async with broker.running("trade"), Client(url, group="g", topics=["trade"], timeout=0.5) as client:
        with pytest.raises(PartlySent) as caught:
            await client.send_many([message("feed"), message("trade"), message("feed"), message("trade")])
        one, two, three, four = caught.value.results
        assert {type(one), type(three)} == {NotConnected}
        assert "no broker is announced for feed" in str(one)
        assert (two.broker, four.broker) == ("b1", "b1")
        with pytest.raises(NotConnected, match="no broker is announced for feed"):
            async with client.transaction(message("feed")):
                raise AssertionError
        with pytest.raises(NotConnected, match="no broker is announced for gold"):
            await client.subscribe(direct("gold", "x"))


@with_zookeeper
async def test_a_session_that_was_lost_changes_nothing(url: str) -> None:
    broker = Announced("b1", url)
    with warnings() as warned:
        async with broker.running("trade"), Client(url, group="g", topics=["trade"]) as client:
            await anyio.to_thread.run_sync(expire, broker.registry)
            for _ in range(100):
                await client.send(message("trade"))
                await anyio.sleep(0.005)
            assert client.statistics().reconnects == 0
            assert len(broker.hellos) == 1
    assert warned == []


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_an_outage_of_the_registry_changes_nothing(loop: str) -> None:
    async def outage(zookeeper: ZooKeeperProcess) -> None:
        url = f"zk://{zookeeper.address}"
        broker = Announced("b1", url)
        async with broker.running("trade"), Client(url, group="g", topics=["trade"]) as client:
            zookeeper.kill()
            await until(lambda: "connected" not in client.statistics().registry.split(": ")[-1])
            await client.send(message("trade"))
            await broker.ledger.connections[0].stream.aclose()  # known brokers are connected again
            await until(lambda: client.statistics().reconnects == 1)
            await client.send(message("trade"))

    with ZooKeeperProcess() as zookeeper:
        anyio.run(outage, zookeeper, backend=loop)


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_credentials_that_are_refused_are_an_authentication_error(
    loop: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def enter(url: str) -> None:
        monkeypatch.setenv("KITEQ_ZK_AUTH", "kiteq:wrong")
        with pytest.raises(AuthenticationError, match="does not accept the user and password of KITEQ_ZK_AUTH"):
            async with Client(url, group="g", topics=["trade"]):
                raise AssertionError
        async with Client(url, group="g", topics=["trade"], wait=False) as client:
            await until(lambda: "does not accept" in client.statistics().registry)
        monkeypatch.setenv("KITEQ_ZK_AUTH", "kiteq:right")
        with pytest.raises(NotConnected, match="no broker is announced for trade"):
            async with Client(url, group="g", topics=["trade"], timeout=3):
                raise AssertionError

    with ZooKeeperProcess(users={"kiteq": "right"}, sasl="required") as zookeeper:
        anyio.run(enter, f"zk://{zookeeper.address}", backend=loop)
    # What kazoo says about it, a traceback too, is not for the user.
    assert {record.name for record in caplog.records} == {"kiteq_client"}


def test_a_blocking_client_finds_brokers_too(zookeeper: ZooKeeperProcess) -> None:
    url = f"zk://{zookeeper.address}/test-{uuid.uuid4().hex[:12]}"
    broker = Announced("b1", url)

    def use() -> str:
        with BlockingClient(url, group="g", topics=["trade"]) as client:
            with client.transaction(message("trade")):
                pass
            assert client.statistics().registry == f"{url}: connected"
            return client.send(message("trade")).broker

    async def serve() -> None:
        async with broker.running("trade"):
            assert await anyio.to_thread.run_sync(use) == "b1"

    anyio.run(serve)
    assert len(broker.ledger.committed) == 1
