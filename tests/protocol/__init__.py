"""A client written from doc/protocol.md alone, against a real broker: what the page says is enough."""
