"""Benchmarks: fused waves against what a user has today, and the memory of sharded loading."""
