"""Brokers that serve different topics, come, go and change, with a registry that says so at once."""

from __future__ import annotations

import anyio
import pytest

from kiteq.message import Message, decode
from kiteq.registry.layout import Server
from kiteq.remoting.packets import Decide, Hello, Publish, Refusal
from kiteq_client import Client, Decision, DecisionPending, NotConnected, Received, SendTimeout
from kiteq_client.broker import Broker
from kiteq_client.outgoing import Frame
from tests.client.announcing import announce, finding_client
from tests.client.ledger import Ledger, everything, until
from tests.client.peer import Connection, both_loops, peer


def message(topic: str = "trade", body: bytes = b"x") -> Message:
    return Message(topic, "pay", body)


@both_loops
async def test_brokers_of_different_topics_do_not_wake_each_other_while_there_is_no_room() -> None:
    trade, feed = Ledger("b1"), Ledger("b2")
    trade.lose = feed.lose = everything
    asked = 0
    with finding_client() as client:
        async with peer(trade.script) as one, peer(feed.script) as two, client, anyio.create_task_group() as tasks:
            announce(client, (one, Server("b1", 1, 1), ("trade",)), (two, Server("b2", 1, 1), ("feed",)))
            await until(lambda: len(client.statistics().connected) == 2)
            take = client._brokers._spread.take

            def counted(broker: Broker, body_bytes_max: int) -> Frame | None:
                nonlocal asked
                asked += 1
                return take(broker, body_bytes_max)

            for broker in client._brokers.all:
                broker._take = counted
            for topic in ("trade", "feed"):
                tasks.start_soon(client.send_many, [message(topic, bytes(200_000)) for _ in range(60)])
            await until(lambda: client.statistics().in_flight > 75)  # 16 MiB less a message
            await anyio.sleep(0.1)
            assert asked < 300  # one frame for each message, and some looks
            tasks.cancel_scope.cancel()
            trade.lose = feed.lose = lambda _packet: False


def at(address: str, name: str, *topics: str, epoch: int = 1) -> tuple[str, Server, tuple[str, ...]]:
    return address, Server(name, epoch, 1), topics


def connected(client: Client) -> int:
    return len(client.statistics().connected)


@both_loops
async def test_what_a_broker_has_that_is_not_announced_is_not_unknown() -> None:
    has_it, other = Ledger("b1"), Ledger("b2")
    with finding_client(topics=["trade"]) as client:
        async with peer(has_it.script) as one, peer(other.script) as two, client:
            announce(client, at(one, "b1", "trade"))
            await until(lambda: connected(client))
            prepared = await client.prepare(message())
            announce(client, at(two, "b2", "trade"))
            await has_it.connections[0].stream.aclose()
            await until(lambda: client.statistics().connected == (two,))
            with pytest.raises(NotConnected, match=r"broker b1, which has transaction .* is not connected"):
                await client.commit(prepared)
            announce(client, at(one, "b1", "trade"), at(two, "b2", "trade"))
            await until(lambda: connected(client) == 2)
            await client.commit(prepared)
    assert has_it.committed == {prepared.id}


@both_loops
async def test_a_broker_that_owes_an_answer_is_dialled_only_where_it_is_announced_now() -> None:
    ledger = Ledger("b1")
    ledger.lose = lambda packet: isinstance(packet, Decide)

    async def hang_up(_connection: Connection) -> None: ...

    with finding_client(topics=["trade"], timeout=0.4) as client:
        async with peer(ledger.script, hang_up) as one, peer(hang_up) as two, client:
            announce(client, at(one, "b1", "trade"))
            await until(lambda: connected(client))
            prepared = await client.prepare(message())
            with pytest.raises(DecisionPending):
                await client.commit(prepared)
            await ledger.connections[0].stream.aclose()
            await until(lambda: not connected(client))
            announce(client, at(two, "b1", "trade", epoch=2))
            await until(lambda: set(client.statistics().not_reached) == {two})


@both_loops
async def test_the_answer_to_a_check_waits_for_a_broker_that_was_forgotten_meanwhile() -> None:
    ledger = Ledger("b1")
    asked, may_answer = anyio.Event(), anyio.Event()

    async def check(_message: Received) -> Decision:
        asked.set()
        await may_answer.wait()
        return Decision.COMMIT

    with finding_client(topics=["trade"], on_check=check) as client:
        async with peer(ledger.script) as one, client:
            announce(client, at(one, "b1", "trade"))
            await until(lambda: connected(client))
            prepared = await client.prepare(message())
            await ledger.ask(prepared.id)
            await asked.wait()
            announce(client)
            await ledger.connections[0].stream.aclose()
            await until(lambda: not client._brokers.all)
            may_answer.set()
            await until(lambda: client.statistics().pending_decisions)
            announce(client, at(one, "b1", "trade", epoch=2))
            await until(lambda: ledger.committed)


@both_loops
async def test_a_decision_that_went_to_the_broker_that_asked_is_sent_again_there() -> None:
    still, asks = Ledger("b1"), Ledger("b2")
    key = message().id
    still.lose = everything
    asks.open[key] = [Message("trade", "pay", b"x", id=key).encoded()]
    asks.handles[key] = 7
    asks.lose = lambda packet: isinstance(packet, Decide)
    with finding_client(topics=["trade"], timeout=0.4) as client:
        async with peer(still.script) as one, peer(asks.script) as two, client:
            announce(client, at(one, "b1", "trade"))
            await until(lambda: connected(client))
            with pytest.raises(DecisionPending):
                await client.commit(key)
            await until(lambda: len(still.packets(Decide)) > 1)
            announce(client, at(one, "b1", "trade"), at(two, "b2", "trade"))
            await until(lambda: connected(client) == 2)
            await asks.ask(key)
            await until(lambda: asks.packets(Decide))
            asks.lose = lambda _packet: False
            await until(lambda: len(asks.packets(Decide)) > 1)
            assert asks.committed == {key}
            await until(lambda: not client.statistics().pending_decisions)


@both_loops
async def test_a_broker_that_serves_other_topics_now_is_no_reason_for_a_send_to_be_refused() -> None:
    changed, away = Ledger("b1"), Ledger("b2")

    async def refuse(connection: Connection) -> None:
        hello = await connection.expect(Hello)
        await connection.send(Refusal(hello.request, "topic_not_served", "topic 'trade' is not served here", False))

    async def hang_up(_connection: Connection) -> None: ...

    with finding_client(topics=["trade"], timeout=0.5) as client:
        async with peer(changed.script, refuse) as one, peer(away.script, hang_up) as two, client:
            announce(client, at(one, "b1", "trade"), at(two, "b2", "trade"))
            await until(lambda: connected(client) == 2)
            await changed.connections[0].stream.aclose()
            await until(lambda: "is not served" in client.statistics().not_reached.get(one, ""))
            await away.connections[0].stream.aclose()
            await until(lambda: not connected(client))
            with pytest.raises(NotConnected, match=f"{one}: topic 'trade' is not served here"):
                await client.send(message())
            # Once that is known to be so, it is not dialled any more.
            announce(client, at(one, "b1", "feed", epoch=2), at(two, "b2", "trade"))
            await until(lambda: one not in client.statistics().not_reached)


@both_loops
async def test_a_connection_is_used_for_all_topics_though_only_some_are_announced_again() -> None:
    ledger = Ledger("b1")
    with finding_client(topics=["trade", "feed"]) as client:
        async with peer(ledger.script) as one, client:
            announce(client, at(one, "b1", "trade", "feed"))
            await until(lambda: connected(client))
            announce(client)
            announce(client, at(one, "b1", "feed"))
            for topic in ("trade", "feed"):
                await client.send(message(topic))
            announce(client, at(one, "b1", "gold"))
            for topic in ("trade", "feed"):
                await client.send(message(topic))
            assert connected(client) == 1


@both_loops
async def test_half_messages_that_wait_for_room_at_a_lost_broker_are_not_in_the_way_of_others() -> None:
    lost, other = Ledger("b1"), Ledger("b2")
    other.lose = everything

    async def never(_connection: Connection) -> None:
        await anyio.sleep_forever()

    with finding_client(topics=["trade", "feed"], max_in_flight=2, timeout=4) as client:
        async with peer(lost.script, never) as one, peer(other.script) as two, client:
            announce(client, at(one, "b1", "trade"), at(two, "b2", "feed"))
            await until(lambda: connected(client) == 2)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.send, message("feed"))
                await until(lambda: other.seen)
                tasks.start_soon(client.prepare, message(), message())
                await until(lambda: client._producer.outgoing._wanted)
                await lost.connections[0].stream.aclose()
                other.lose = lambda _packet: False
                with anyio.fail_after(2):
                    await client.send(message("feed"))
                tasks.cancel_scope.cancel()


@both_loops
async def test_many_messages_of_one_topic_do_not_hold_up_those_of_another() -> None:
    ledger = Ledger("b1")
    with finding_client(max_in_flight=10) as client:
        async with peer(ledger.script) as one, client:
            announce(client, at(one, "b1", "trade", "feed"))
            await until(lambda: connected(client))
            async with anyio.create_task_group() as tasks:
                for topic in ("trade", "feed"):
                    tasks.start_soon(client.send_many, [message(topic) for _ in range(100)])
    topics = [decode(packet.messages[0], "g", 1).topic for packet in ledger.packets(Publish)]
    assert max(topics.index("trade"), topics.index("feed")) < 4


@both_loops
async def test_a_broker_hears_of_all_topics_that_are_published_though_it_announced_one_after_the_other() -> None:
    ledger = Ledger("b1")
    named: list[list[str]] = []
    scope = anyio.CancelScope()

    async def script(connection: Connection) -> None:
        await connection.accept(broker="b1")
        assert connection.hello is not None
        named.append(connection.hello.topics)
        await ledger.serve(connection)

    with finding_client(topics=["trade", "feed", "gold"], timeout=0.5) as client:
        async with peer(script) as one, client, anyio.create_task_group() as tasks:
            announce(client, at(one, "b1", "trade"))
            await until(lambda: connected(client))
            ledger.lose = everything

            async def send() -> None:
                with scope:
                    await client.send(message("trade"))

            tasks.start_soon(send)
            await until(lambda: ledger.seen)
            announce(client, at(one, "b1", "trade", "feed"))
            announce(client, at(one, "b1", "trade", "feed", "other"))
            # Not while something is under way.
            await anyio.sleep(0.1)
            assert named == [["trade"]]
            with pytest.raises(SendTimeout):
                tasks.start_soon(_release, scope)
                await client.admin("stat")
            assert named == [["trade"]]
            ledger.lose = lambda _packet: False
            await until(lambda: len(named) == 2)
            for topic in ("trade", "feed"):
                await client.send(message(topic))
            assert named == [["trade"], ["trade", "feed"]]


async def _release(scope: anyio.CancelScope) -> None:
    scope.cancel()
