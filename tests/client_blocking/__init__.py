"""Tests of the blocking client, in threads and processes of their own."""
