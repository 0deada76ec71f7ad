"""Bytes to packets to sessions: the wire format without I/O, and the trio session that carries it."""
