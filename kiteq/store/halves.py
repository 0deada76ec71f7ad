"""Undecided transactions: flat columns in memory, one slot for each, and their rows in the store.

A million of them may be open, so nothing here is an object per transaction but its id. What was decided
is not kept in memory; `half_reading` searches the disk.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from struct import Struct
from typing import Final

from kiteq.store.half_cache import HalfCache
from kiteq.store.half_records import COUNTER_KEY, pack_decisions, pack_half
from kiteq.store.half_state import DECIDING, FREE, OPEN, PARKED, State
from kiteq.store.half_tally import GroupTally
from kiteq.store.tables import Row, Table

__all__ = ["Halves", "State"]

TOKEN: Final = Struct(">16sQ")
SHARDS: Final = 256
"""One large dict stops the loop for tens of milliseconds when it grows; so the ids are spread by their last byte."""


class Halves:
    """The columns, by slot: state, handle, row (key of its row: the first handle in it), due (when to ask, in ms
    >> DUE_SHIFT), group, instance (numbers), prepared_s, asks, unknowns.
    """

    __slots__ = (
        "_added_bytes", "_cache", "_free", "_free_instances", "_group_numbers", "_ids", "_instance_numbers",
        "_instance_uses", "_live", "_removing", "asks", "clean_below", "due", "group", "groups", "handle", "instance",
        "instances", "next_decision", "next_handle", "parts", "prepared_s", "row", "state", "touched", "unknowns",
    )  # fmt: skip

    def __init__(self) -> None:
        self._ids: list[dict[bytes, int]] = [{} for _ in range(SHARDS)]
        self._free = array("I")
        self.state = bytearray()
        self.handle = array("Q")
        self.row = array("Q")
        self.due = array("Q")
        self.group = array("I")
        self.instance = array("I")
        self.prepared_s = array("I")
        self.asks = bytearray()
        self.unknowns = bytearray()
        self.groups: list[GroupTally] = []
        self.instances: list[bytes] = []
        self._group_numbers: dict[str, int] = {}
        self._instance_numbers: dict[bytes, int] = {}
        self._instance_uses: list[int] = []
        self._free_instances: list[int] = []
        self._live: dict[int, int] = {}
        """Transactions without a durable decision, of each row that has, or had, more than one."""
        self._removing: set[int] = set()
        """Rows that a decision on its way to the disk removes: it takes all that is left in them."""
        self.touched: dict[int, None] = {}
        """Rows in which some are durably decided: to be rewritten."""
        self.parts: dict[int, list[int]] = {}
        """By handle, rows of messages that were added later."""
        self._added_bytes: dict[int, int] = {}
        self._cache = HalfCache()
        self.next_handle = 1
        self.next_decision = 1
        self.clean_below = 1
        """No row of HALF has a transaction that was decided in a row of DECISIONS before this one."""

    # --- looking up ---------------------------------------------------------------------------

    def find(self, transaction_id: bytes) -> int | None:
        """Return the slot of an undecided transaction."""
        return self._ids[transaction_id[15]].get(transaction_id)

    def knows_any(self, transaction_ids: Sequence[bytes]) -> bool:
        """Return whether any of these transactions is undecided."""
        shards = self._ids
        return bool([one for one in transaction_ids if one in shards[one[15]]])

    def take(self, tokens: Sequence[bytes], group: int | None) -> tuple[list[int], list[bytes], list[int], list[int]]:
        """Let nobody else decide what is open of these transactions, of one group, or of all for None.

        A handle that is not the transaction's is of an earlier one with its id.

        Return the places in `tokens`, ids and slots of what was taken, and the places of the others.
        """
        shards, state, group_of, handle_of, unpack = self._ids, self.state, self.group, self.handle, TOKEN.unpack
        places: list[int] = []
        ids: list[bytes] = []
        slots: list[int] = []
        others: list[int] = []
        for place, token in enumerate(tokens):
            transaction_id, handle = unpack(token) if len(token) > 16 else (token, 0)
            slot = shards[token[15]].get(transaction_id)
            if (
                slot is None or not OPEN <= state[slot] <= PARKED or (handle and handle != handle_of[slot])
                or (group is not None and group_of[slot] != group)
            ):  # fmt: skip
                others.append(place)
                continue
            if state[slot] == PARKED:
                self.tally(slot).parked -= 1
            state[slot] = DECIDING
            places.append(place)
            ids.append(transaction_id)
            slots.append(slot)
        return places, ids, slots, others

    def undecided(self, transaction_id: bytes | None, handle: int) -> bool:
        """Return whether a transaction with this id, None when it cannot be read, and handle is undecided."""
        if transaction_id is None:
            return any(self.handle[slot] == handle for slot in self.slots())
        slot = self.find(transaction_id)
        return slot is not None and self.handle[slot] == handle

    def __len__(self) -> int:
        return len(self.state) - len(self._free)

    def slots(self) -> Iterator[int]:
        """Return the slots in use, in no order."""
        return (slot for slot, state in enumerate(self.state) if state)

    def tally(self, slot: int) -> GroupTally:
        """Return the figures of the group a transaction belongs to."""
        return self.groups[self.group[slot]]

    def known_group(self, name: str) -> int:
        """Return the number of a group in the column `group`, -1 when none of its transactions was ever here."""
        return self._group_numbers.get(name, -1)

    def tally_of(self, group: str) -> GroupTally:
        """Return the figures of a group."""
        return self.groups[self._group_number(group)]

    def instance_id(self, slot: int) -> bytes:
        """Return the client instance that prepared a transaction."""
        return self.instances[self.instance[slot]]

    def messages(self, slots: Sequence[int]) -> list[list[bytes]] | None:
        """Return the messages of transactions, for each of them, when all are in memory."""
        handles, rows, get, parts = self.handle, self.row, self._cache.get, self.parts
        first = rows[slots[0]]
        blobs = None if parts else self._cache.singles(first)
        if blobs is not None and all([rows[slot] == first for slot in slots]):  # noqa: C419 half the time
            return [[blobs[handles[slot] - first]] for slot in slots]
        found: list[list[bytes]] = []
        for slot in slots:
            handle, row = handles[slot], rows[slot]
            mine = get(row, handle - row)
            for part in parts.get(handle, ()) if parts else ():
                added = self._cache.get_all(part)
                if mine is None or added is None:
                    return None
                mine += added
            if mine is None:
                return None
            found.append(mine)
        return found

    def rows_of(self, slots: Iterable[int]) -> dict[int, list[int]]:
        """Return the rows that each transaction is in, by handle, in the order of the slots."""
        return {(handle := self.handle[slot]): [self.row[slot], *self.parts.get(handle, ())] for slot in slots}

    # --- changes, on the loop -----------------------------------------------------------------

    def add(
        self,
        ids: Sequence[bytes],
        sizes: Sequence[int],
        blobs: list[bytes],
        *,
        group: str,
        instance: bytes,
        prepared_ms: int,
        check_ms: int,
    ) -> tuple[list[int], Row]:
        """Take transactions, in the state PREPARING; return their slots, and their row for the store."""
        first = self.next_handle
        self.next_handle += len(ids)
        handles = range(first, self.next_handle)
        slots = self.restore(
            ids, handles, first, group=group, instance=instance, prepared_ms=prepared_ms, state=State.PREPARING
        )
        self._cache.put(first, sizes, blobs)
        key = COUNTER_KEY.pack(first)
        return slots, (
            Table.HALF,
            key,
            pack_half(key, group, instance, prepared_ms, check_ms, handles, sizes, blobs),
        )

    def restore(
        self,
        ids: Sequence[bytes],
        handles: Sequence[int],
        row: int,
        *,
        group: str,
        instance: bytes,
        prepared_ms: int,
        state: State = State.OPEN,
    ) -> list[int]:
        """Take transactions of one row into memory; return their slots."""
        number = self._group_number(group)
        user = self._instance_number(instance, len(ids))
        tally = self.groups[number]
        tally.open += len(ids)
        tally.oldest_s = min(tally.oldest_s or prepared_ms // 1000, prepared_ms // 1000)
        prepared_s = prepared_ms // 1000
        slots = self._take_slots(len(ids))
        shards, states, handle_of, row_of, due = self._ids, self.state, self.handle, self.row, self.due
        group_of, instance_of, prepared_of = self.group, self.instance, self.prepared_s
        asks, unknowns = self.asks, self.unknowns
        for transaction_id, handle, slot in zip(ids, handles, slots, strict=True):
            states[slot] = state
            handle_of[slot] = handle
            row_of[slot] = row
            due[slot] = 0
            group_of[slot] = number
            instance_of[slot] = user
            prepared_of[slot] = prepared_s
            asks[slot] = unknowns[slot] = 0
            shards[transaction_id[15]][transaction_id] = slot
        if len(ids) > 1 or row in self.touched:
            self._live[row] = len(ids)
        return slots

    def enlist(self, slot: int, blobs: list[bytes], now_ms: int) -> Row:
        """Add messages to a transaction; return their row for the store."""
        row = self.next_handle
        self.next_handle += 1
        handle = self.handle[slot]
        self.parts.setdefault(handle, []).append(row)
        self._added_bytes[handle] = self.added_bytes(slot) + sum(map(len, blobs))
        self._cache.put(row, [len(blobs)], blobs)
        key = COUNTER_KEY.pack(row)
        group, instance = self.tally(slot).name, self.instance_id(slot)
        value = pack_half(key, group, instance, now_ms, 0, [handle], [len(blobs)], blobs, enlisted=True)
        return (Table.HALF, key, value)

    def added_bytes(self, slot: int) -> int:
        """Return the bytes of the messages that were added to a transaction since the start."""
        return self._added_bytes.get(self.handle[slot], 0)

    def withdraw_part(self, slot: int, row: Row, size: int) -> None:
        """Take back messages, of so many bytes, that were not stored after all."""
        handle, number = self.handle[slot], COUNTER_KEY.unpack(row[1])[0]
        self.parts[handle].remove(number)
        self._added_bytes[handle] -= size
        self._cache.forget(number)

    def opened(self, slots: Sequence[int]) -> None:
        """Note that transactions are durable; they were in the state PREPARING."""
        state = self.state
        for slot in slots:
            state[slot] = OPEN

    def park(self, slot: int) -> None:
        """Note that the checks of a transaction have led nowhere."""
        if self.state[slot] == State.OPEN:
            self.state[slot] = State.PARKED
            self.tally(slot).parked += 1

    def unpark(self, slot: int) -> None:
        """Let the checks of a parked transaction begin again."""
        if self.state[slot] == State.PARKED:
            self.state[slot] = State.OPEN
            self.tally(slot).parked -= 1
        self.unknowns[slot] = 0

    def reopen(self, slot: int) -> None:
        """Note that a decision was not taken after all. A parked transaction becomes an open one."""
        self.state[slot] = State.OPEN

    def decide(
        self, ids: Sequence[bytes], slots: Sequence[int], *, commit: bool, at_ms: int, by: str, reason: str | None
    ) -> list[Row]:
        """Return the rows of decisions, all of one group; the slots are in the state DECIDING."""
        key = COUNTER_KEY.pack(self.next_decision)
        self.next_decision += 1
        handles, asks = self.handle, self.asks
        entries = [
            (handles[slot], transaction_id, commit, asks[slot] > 0)
            for transaction_id, slot in zip(ids, slots, strict=True)
        ]
        group = self.tally(slots[0]).name
        rows: list[Row] = [(Table.DECISIONS, key, pack_decisions(key, at_ms, group, by, reason, entries))]
        for row, count in _counts(self.row, slots).items():
            if self._live.get(row, 1) == count:
                self._removing.add(row)
                rows.append((Table.HALF, COUNTER_KEY.pack(row), None))
        if self.parts:
            parts = [part for slot in slots for part in self.parts.get(handles[slot], ())]
            rows.extend((Table.HALF, COUNTER_KEY.pack(part), None) for part in parts)
        return rows

    def undo(self, slots: Sequence[int]) -> None:
        """Take back `decide`: its rows were refused."""
        for slot in slots:
            self._removing.discard(self.row[slot])
            self.reopen(slot)

    def forget(self, ids: Sequence[bytes], slots: Sequence[int]) -> list[Row]:
        """Free the slots of transactions of one group that are decided, or were not stored.

        Return what removes the rows that several decisions emptied together: none of them knew that the others
        would not be refused.
        """
        by_last_byte, state = self._ids, self.state
        for transaction_id, slot in zip(ids, slots, strict=True):
            del by_last_byte[transaction_id[15]][transaction_id]
            state[slot] = FREE
        self._free.extend(slots)
        self.tally(slots[0]).open -= len(slots)
        for number, uses in _counts(self.instance, slots).items():
            self._instance_uses[number] -= uses
            if not self._instance_uses[number]:
                del self._instance_numbers[self.instances[number]]
                self._free_instances.append(number)
        emptied: list[Row] = []
        for row, count in _counts(self.row, slots).items():
            live = self._live.get(row, 1) - count
            if live:
                self._live[row] = live
                self.touched[row] = None
                continue
            self._live.pop(row, None)
            self.touched.pop(row, None)
            self._cache.forget(row)
            if row in self._removing:
                self._removing.discard(row)
            else:
                emptied.append((Table.HALF, COUNTER_KEY.pack(row), None))
        for slot in slots if self.parts else ():
            handle = self.handle[slot]
            for part in self.parts.pop(handle, ()):
                self._cache.forget(part)
            self._added_bytes.pop(handle, None)
        return emptied

    def is_live(self, row: int) -> bool:
        """Return whether a row of several transactions still has undecided ones."""
        return row in self._live

    def is_leaving(self, row: int) -> bool:
        """Return whether a decision that removes a row is on its way to the disk; it may be refused."""
        return row in self._removing

    # --- numbers of what is named --------------------------------------------------------------

    def _take_slots(self, count: int) -> list[int]:
        """Return free slots; the columns grow when there are not enough."""
        slots = self._free[-count:].tolist()
        del self._free[-count:]
        missing, first = count - len(slots), len(self.state)
        if missing:
            slots.extend(range(first, first + missing))
            for column in (self.state, self.asks, self.unknowns):
                column.extend(bytes(missing))
            for numbers in (self.handle, self.row, self.due, self.group, self.instance, self.prepared_s):
                numbers.frombytes(bytes(missing * numbers.itemsize))
        return slots

    def _group_number(self, name: str) -> int:
        number = self._group_numbers.get(name)
        if number is None:
            number = self._group_numbers[name] = len(self.groups)
            self.groups.append(GroupTally(name))
        return number

    def _instance_number(self, instance: bytes, uses: int) -> int:
        number = self._instance_numbers.get(instance)
        if number is None:
            if self._free_instances:
                number = self._free_instances.pop()
                self.instances[number] = instance
            else:
                number = len(self.instances)
                self.instances.append(instance)
                self._instance_uses.append(0)
            self._instance_numbers[instance] = number
        self._instance_uses[number] += uses
        return number


def _counts(column: array[int], slots: Sequence[int]) -> dict[int, int]:
    """Return how often each number stands in a column at these slots; mostly it is the same one at all."""
    numbers = [column[slot] for slot in slots]
    if numbers.count(numbers[0]) == len(numbers):
        return {numbers[0]: len(numbers)}
    return Counter(numbers)
