"""The HTTP port: what the broker tells monitoring, and people with a browser."""
