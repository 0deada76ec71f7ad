"""The whole broker over real sockets: what it promises to consumers and producers, packet by packet."""
