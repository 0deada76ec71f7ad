"""What must be true after each step: answers, deliveries, figures, and the columns of the transactions."""

from __future__ import annotations

from collections import Counter, defaultdict

from kiteq.remoting import packets
from kiteq.store.halves import State
from tests.model.clients import Clients
from tests.model.harness import Connection
from tests.model.oracle import UNKNOWN, Request

STATES = {
    "preparing": State.PREPARING, "open": State.OPEN, "parked": State.PARKED, "deciding": State.DECIDING,
}  # fmt: skip


def check(clients: Clients) -> None:
    """Compare the broker with the oracle."""
    for connection in clients.harness.connections:
        check_answers(clients, connection)
        take_deliveries(clients, connection)
    check_deliveries(clients)
    check_columns(clients)
    check_pending(clients)
    if not clients.harness.queued:
        assert not [one.peer.name for one in clients.harness.connections if one.peer.uncommitted_bytes]


def check_answers(clients: Clients, connection: Connection) -> None:
    """Each request is answered once, as soon as all of it is known, and rightly."""
    pending = clients.oracle.pending[connection]
    answers: list[packets.Prepared | packets.Decided | packets.Refusal] = [
        *connection.take(packets.Prepared), *connection.take(packets.Decided), *connection.take(packets.Refusal),
    ]  # fmt: skip
    for packet in answers:
        request = pending.pop(packet.request)
        assert request.left == 0, f"answered before it was durable: {packet}"
        check_answer(request, packet)
    assert not [number for number, request in pending.items() if request.left == 0], "an answer is missing"
    assert not [packet for packet in connection.received if not isinstance(packet, packets.Deliver)]


def check_answer(request: Request, packet: packets.Prepared | packets.Decided | packets.Refusal) -> None:
    if isinstance(packet, packets.Refusal):
        assert packet.code == request.refusal
        return
    assert request.refusal is None
    codes = {place: code for place, code, *_ in packet.exceptions}
    assert len(codes) == len(packet.exceptions)
    expected = {place: code for place, code in request.codes.items() if code is not None}
    for place in request.anything:
        if codes.get(place) == UNKNOWN:
            expected[place] = UNKNOWN
    assert codes == expected, (codes, expected, packet)
    if isinstance(packet, packets.Prepared):
        handles = packet.handles
        if isinstance(handles, int):
            handles = [handles + place for place in range(len(request.handles))] or [handles]
        assert [place for place, handle in enumerate(handles) if handle] == sorted(request.handles)
        assert {place: handles[place] for place in request.handles} == {
            place: transaction.handle for place, transaction in request.handles.items()
        }


def take_deliveries(clients: Clients, connection: Connection) -> None:
    """A group is given what it is owed, each message once, and first in order."""
    group = connection.peer.group
    owed, held, delivered = clients.oracle.owed[group], clients.held[group], clients.delivered[group]
    for packet in connection.take(packets.Deliver):
        for at, blob in enumerate(packet.messages):
            message_id = blob[:16]
            assert message_id in owed, f"{group} was given what it is not owed"
            assert blob == owed[message_id].blob
            assert message_id not in held, f"{group} was given a message twice at once"
            held[message_id] = (connection, packet.first_tag + at)
            if message_id not in delivered:
                delivered.append(message_id)


def check_deliveries(clients: Clients) -> None:
    for group in clients.oracle.bindings:
        owed, held = clients.oracle.owed[group], clients.held[group]
        if clients.members(group):
            assert held.keys() == owed.keys(), f"{group} was not given what it is owed"
        else:
            assert not held
        place = {message_id: number for number, message_id in enumerate(owed)}
        for topic in ("t", "u"):
            order = [place[one] for one in clients.delivered[group] if one in owed and owed[one].topic == topic]
            assert order == sorted(order), f"{group} was given messages out of order"


def check_columns(clients: Clients) -> None:
    """Slots, states and tallies agree with the transactions that are not decided; no slot is lost."""
    halves = clients.harness.store.halves
    undecided = clients.oracle.undecided()
    slots = {one.id: slot for one in undecided if (slot := halves.find(one.id)) is not None}
    assert slots.keys() == {one.id for one in undecided}
    assert len(halves) == len(undecided)
    assert sorted(slots.values()) == sorted(halves.slots())
    assert sorted([*slots.values(), *halves._free]) == list(range(len(halves.state)))
    for one in undecided:
        slot = slots[one.id]
        assert halves.state[slot] == STATES[one.state]
        assert (halves.tally(slot).name, halves.instance_id(slot)) == (one.group, one.instance)
        assert one.state == "preparing" or halves.handle[slot] == one.handle
        counted = (halves.asks[slot], halves.unknowns[slot])
        assert counted == (one.asks, one.unknowns), (counted, one.asks, one.unknowns, one.durable, one)
    for tally in halves.groups:
        mine = [one.state for one in undecided if one.group == tally.name]
        assert (tally.open, tally.parked) == (len(mine), mine.count("parked"))
    uses = Counter(halves.instance[slot] for slot in slots.values())
    assert uses == Counter({number: used for number, used in enumerate(halves._instance_uses) if used})


def check_pending(clients: Clients) -> None:
    """The figures of groups count what is owed and what is about to be, never a half message."""
    expected: dict[tuple[str, str], int] = defaultdict(int)
    for group, owed in clients.oracle.owed.items():
        for message in owed.values():
            expected[group, message.topic] += 1
    for transaction in clients.oracle.undecided():
        for message, groups in transaction.deciding.routed if transaction.deciding is not None else ():
            for group in groups:
                expected[group, message.topic] += 1
    for outlet in clients.harness.core.router.outlets():
        subscription = outlet.subscription
        assert subscription.pending == expected[subscription.group, subscription.topic.name]
        assert (subscription.retrying, subscription.dead) == (0, 0)


def check_empty(clients: Clients) -> None:
    """Nothing is left of transactions when all are decided."""
    halves = clients.harness.store.halves
    assert not clients.oracle.undecided()
    assert len(halves) == 0
    left = (halves._live, halves._removing, halves.parts, halves.touched, halves._added_bytes, halves._cache._rows)
    assert not any(left), left
    assert not any(halves._ids)
    core = clients.harness.core
    assert not core.transactions._waiting
    assert not core.checks._asked
