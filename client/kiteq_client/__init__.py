"""The client of kiteq: send durable messages, and handle those your group is bound to."""

from kiteq.binding.bindings import Binding, direct, fanout, regex
from kiteq.errors import (
    AuthenticationError,
    ClientClosed,
    DecisionPending,
    KiteQError,
    MessageTooLarge,
    NotConnected,
    PartlySent,
    Refused,
    SendTimeout,
    TransactionConflict,
    UnknownTransaction,
)
from kiteq.message import Message, Receipt, Received
from kiteq_client.by_id import Prepared
from kiteq_client.checking import Checker
from kiteq_client.client import Client
from kiteq_client.decision import Decision
from kiteq_client.delivery import Delivery
from kiteq_client.handlers import Handlers, Reject, RetryAfter
from kiteq_client.statistics import Statistics
from kiteq_client.transaction import Outcome, Transaction

__all__ = [
    "AuthenticationError",
    "Binding",
    "Checker",
    "Client",
    "ClientClosed",
    "Decision",
    "DecisionPending",
    "Delivery",
    "Handlers",
    "KiteQError",
    "Message",
    "MessageTooLarge",
    "NotConnected",
    "Outcome",
    "PartlySent",
    "Prepared",
    "Receipt",
    "Received",
    "Refused",
    "Reject",
    "RetryAfter",
    "SendTimeout",
    "Statistics",
    "Transaction",
    "TransactionConflict",
    "UnknownTransaction",
    "direct",
    "fanout",
    "regex",
]
