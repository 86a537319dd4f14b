"""Benchmarks: each prints a table, and a ratio to a peer from the same run."""
