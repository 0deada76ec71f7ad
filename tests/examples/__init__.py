"""The programs of `examples/`, run as a reader of the README runs them."""
