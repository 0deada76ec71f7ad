"""The message store: a log of what was accepted, a log of what was settled, on a choice of engines."""
