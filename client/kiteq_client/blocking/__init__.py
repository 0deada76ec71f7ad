"""The client of kiteq without `async`: for Django, Flask, Celery and plain scripts."""

from kiteq_client.blocking.client import Client
from kiteq_client.blocking.delivery import Deliveries, Delivery
from kiteq_client.blocking.handlers import Handlers

__all__ = ["Client", "Deliveries", "Delivery", "Handlers"]
