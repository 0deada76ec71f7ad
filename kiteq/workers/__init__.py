"""Several brokers behind one command: what they share, and the process that runs them."""
