"""The way of a message through the broker: events, handlers, and their one order."""
