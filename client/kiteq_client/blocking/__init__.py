"""The client of kiteq without `async`: for Django, Flask, Celery and plain scripts."""

from kiteq_client.blocking.client import Client
from kiteq_client.blocking.delivery import Deliveries, Delivery
from kiteq_client.blocking.handlers import Checker, Handlers
from kiteq_client.blocking.transaction import Transaction

__all__ = ["Checker", "Client", "Deliveries", "Delivery", "Handlers", "Transaction"]
