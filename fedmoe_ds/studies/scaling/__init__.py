"""Scaling: one axis of a configuration at several values as runs of the real command, and how throughput and time follow it."""

from fedmoe_ds.studies.scaling.command import Request, scale

__all__ = ["Request", "scale"]
