"""Bindings: which messages a group asked for."""
