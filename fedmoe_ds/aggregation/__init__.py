"""Aggregation: mergeable sums, the one collective of a round, server steps."""
