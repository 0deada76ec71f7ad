"""The tests of kiteq."""
