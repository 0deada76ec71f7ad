"""What both services do alike: consume, publish with transactions, answer the broker's checks."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import ClassVar

import anyio

from examples.orders.database import Database, Transaction
from examples.orders.steps import Steps, name_of
from kiteq_client import Client, Decision, Handlers, Message, Outcome, Received, direct
from kiteq_client import Transaction as MessageTransaction

Handler = Callable[[Received], Awaitable[None]]


class Service:
    """name: also the group of the client. topic: what it publishes. table, accounts: its database at first."""

    name: ClassVar[str]
    topic: ClassVar[str]
    table: ClassVar[str]
    accounts: ClassVar[dict[str, int]]

    def __init__(self, database: Database, crash_at: str | None) -> None:
        self.steps = Steps(self.name, crash_at)
        self._database = database
        database.create(self.table, self.accounts)
        self._marker = database.marker()

    def consumes(self) -> dict[tuple[str, str], Handler]:
        """Return the handler of each topic and message type."""
        raise NotImplementedError

    async def run(self, broker: str) -> None:
        """Work until Ctrl-C or SIGTERM."""
        handlers, bindings = Handlers(), []
        for (topic, message_type), handler in self.consumes().items():
            handlers.on(topic, message_type)(handler)
            # "first": also what was sent before this service ran for the first time.
            bindings.append(direct(topic, message_type, start="first"))
        self._client = Client(
            f"kiteq://{broker}", group=self.name, topics=[self.topic],
            bindings=bindings, handlers=handlers, on_check=self,
        )  # fmt: skip
        async with self._client:
            self.steps.say("ready; Ctrl-C ends")
            await self._client.run()
        await self._marker.aclose()

    # --- a message that is delivered if, and only if, the database transaction committed --------
    async def publish_with(self, message: Message, write: Callable[[Transaction], bool]) -> Outcome:
        """Publish with a database transaction: `write` writes its rows, and returns whether to commit."""
        self.steps.reach("before-prepare")
        async with self._client.transaction(message) as tx:
            self.steps.say(f'half message "{message.message_type}" stored: the broker holds it back')
            self.steps.reach("after-prepare")
            await anyio.to_thread.run_sync(self._write, tx, write)
            self.steps.reach("after-local-commit")
            # The marker, too, has such a function: there it looks for its committed row.
            tx.on_leave(lambda: self.steps.reach("before-commit-sent"))
        self.steps.say(f'message "{message.message_type}" {tx.outcome}')
        self.steps.reach("after-commit-sent")
        return tx.outcome

    def _write(self, tx: MessageTransaction, write: Callable[[Transaction], bool]) -> None:
        with self._database.transaction() as database:
            self._marker.mark(database.connection, tx)  # one more row, in the marker's own table
            if not write(database):
                database.connection.rollback()  # the marker then rolls back the message, too
                self.steps.say("database rolled back")
                return
            self.steps.reach("in-local-transaction")
        self.steps.say("database committed")

    # --- the broker's questions about messages that are not decided: the marker's table knows ---
    async def check(self, message: Received) -> Decision:
        decision = await self._marker.check(message)
        order = name_of(json.loads(message.body)["order"])
        self.steps.say(f'the broker asks about "{message.message_type}" of {order}: {decision.value}')
        self.steps.reach("during-check")
        return decision

    async def decided(self, transaction_id: bytes, decision: Decision) -> None:
        await self._marker.decided(transaction_id, decision)

    # --- plain use of the database --------------------------------------------------------------
    async def has_row(self, sql: str, *values: object) -> bool:
        return bool(await anyio.to_thread.run_sync(self._run, sql, values))

    async def change(self, sql: str, *values: object) -> None:
        await anyio.to_thread.run_sync(self._run, sql, values)

    def _run(self, sql: str, values: tuple[object, ...]) -> list[tuple[object, ...]]:
        with self._database.transaction() as database:
            return database.run(sql, *values)
