"""Crash tests: histories written beside the broker, and a checker that judges them."""
