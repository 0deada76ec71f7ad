"""Everything kiteq raises, as one tree.

    KiteQError
     +-- Refused                 the broker said no, with a code and a reason
     |    +-- AuthenticationError
     |    +-- MessageTooLarge
     |    +-- TransactionConflict
     |    +-- UnknownTransaction
     +-- NotConnected            no broker took the connection (also a ConnectionError)
     +-- SendTimeout             no answer in time: the outcome is unknown (also a TimeoutError)
     +-- DecisionPending         no answer to a commit in time: the local transaction stands
     +-- PartlySent              some messages of a `send_many` were not accepted
     +-- ClientClosed            the client was used outside its `async with` block
     +-- ProtocolError
     |    +-- LocalProtocolError     our own code broke the wire format
     |    +-- RemoteProtocolError    the peer broke the wire format
     +-- StoreError
     |    +-- StoreFull              no room: publishing is refused, nothing stored is lost
     |    +-- StoreUnusable          the folder or its content cannot be used
     |    +-- StoreFailed            an I/O error in a commit: the process must end
     +-- ConfigError             a setting is wrong; the text names the setting and its source

A class that a user of the client meets says in its docstring whose fault it is and what to do.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AuthenticationError",
    "ClientClosed",
    "ConfigError",
    "DecisionPending",
    "KiteQError",
    "LocalProtocolError",
    "MessageTooLarge",
    "NotConnected",
    "PartlySent",
    "ProtocolError",
    "Refused",
    "RemoteProtocolError",
    "SendTimeout",
    "StoreError",
    "StoreFailed",
    "StoreFull",
    "StoreUnusable",
    "TransactionConflict",
    "UnknownTransaction",
    "refusal",
]


class KiteQError(Exception):
    """The root of all errors of kiteq."""


class Refused(KiteQError):
    """The broker refused a request.

    `code` is a stable machine word (`doc/protocol.md` lists them), `reason` a sentence for people.
    When `temporary` is true the same request may succeed later; otherwise it must be changed.
    """

    def __init__(self, code: str, reason: str, temporary: bool = False) -> None:  # noqa: FBT002
        super().__init__(f"{reason} [{code}]")
        self.code = code
        self.reason = reason
        self.temporary = temporary

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the three values, so that the error survives pickling."""
        return type(self), (self.code, self.reason, self.temporary)


class AuthenticationError(Refused):
    """The broker does not accept this group with this secret."""


class MessageTooLarge(Refused):
    """The body is larger than the broker accepts."""


class TransactionConflict(Refused):
    """The transaction was already decided the other way."""


class UnknownTransaction(Refused):
    """The broker does not know this transaction."""


class NotConnected(KiteQError, ConnectionError):
    """No broker could be reached, or none serves the topic."""


class SendTimeout(KiteQError, TimeoutError):
    """No answer came in time, so whether the message is stored is unknown.

    Sending the same `Message` object again within ten minutes is safe: a broker stores it once. Where there are
    several, another one may take it, and it may be delivered twice.
    """


class DecisionPending(KiteQError):
    """No answer to the commit came in time; your local transaction stands.

    The client goes on resending the decision, and the broker asks for it if that fails too.
    """


class PartlySent(KiteQError):
    """Some messages of a `send_many` were not accepted.

    `results` has, in the order of the messages, a `Receipt` or the error of each one.
    """

    def __init__(self, results: list[Any]) -> None:
        failed = [result for result in results if isinstance(result, BaseException)]
        first = failed[0] if failed else None
        super().__init__(f"{len(failed)} of {len(results)} messages were not accepted; first: {first}")
        self.results = results


class ClientClosed(KiteQError):
    """The client was used before its `async with` block was entered or after it was left."""


class ProtocolError(KiteQError):
    """Bytes or packets that break `doc/protocol.md`."""


class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol forbids: a defect here."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol forbids: a defect there. The connection is closed."""


class StoreError(KiteQError):
    """A problem of the message store."""


class StoreFull(StoreError):
    """The store has no room for more messages; consuming goes on and frees some."""


class StoreUnusable(StoreError):
    """The store cannot be opened: the text says why and what to do."""


class StoreFailed(StoreError):
    """Writing to the disk failed; nothing can be promised until the process has restarted."""


class ConfigError(KiteQError):
    """A setting is wrong; the text names the setting, where it came from and what is allowed."""


_REFUSALS: dict[str, type[Refused]] = {
    "authentication_failed": AuthenticationError,
    "message_too_large": MessageTooLarge,
    "transaction_conflict": TransactionConflict,
    "unknown_transaction": UnknownTransaction,
}


def refusal(code: str, reason: str, temporary: bool = False) -> Refused:  # noqa: FBT002
    """Return the error class that belongs to a refusal code of the wire protocol."""
    return _REFUSALS.get(code, Refused)(code, reason, temporary)
