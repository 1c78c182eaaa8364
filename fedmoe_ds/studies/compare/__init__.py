"""Comparison: methods x seeds as runs of the real command, and what they say together."""

from fedmoe_ds.studies.compare.command import Request, compare

__all__ = ["Request", "compare"]
