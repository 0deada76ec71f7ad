"""Messages bound to your own database transactions, without a check function of your own.

`Marker` writes one row, the transaction id of the message, in the database transaction you pass, and answers
the broker's checks from that table. It needs the driver of your database, and nothing else.
"""

from kiteq_client.marker.errors import AlreadyRolledBack, MarkerError, MarkRefused, StillInTransaction
from kiteq_client.marker.marker import Marker

__all__ = ["AlreadyRolledBack", "MarkRefused", "Marker", "MarkerError", "StillInTransaction"]
