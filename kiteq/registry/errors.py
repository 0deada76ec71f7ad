"""What goes wrong with a registry.

RegistryUnavailable: no answer now; what was asked for is done when the registry is back.
CredentialsRefused: the registry answers, but does not accept who we are.
AddressTaken: another broker has announced itself at this address.
UnreadableNode: a node is not what KiteQ writes; it is left alone until somebody deletes it.
"""

from __future__ import annotations

from kiteq.errors import KiteQError

__all__ = ["AddressTaken", "CredentialsRefused", "RegistryError", "RegistryUnavailable", "UnreadableNode"]


class RegistryError(KiteQError):
    """A problem of the registry."""


class RegistryUnavailable(RegistryError):
    """The registry gave no answer in time.

    Nothing has to be done: running traffic does not need it, and what was asked for is kept and done
    when the registry is back.
    """


class CredentialsRefused(RegistryError):
    """The registry does not accept these credentials, or wants some: see KITEQ_ZK_AUTH."""


class AddressTaken(RegistryError):
    """Another broker has announced itself at this address: two brokers advertise the same one."""


class UnreadableNode(RegistryError):
    """A node of the registry is not what KiteQ writes; deleting it lets the brokers write it anew."""
