"""Methods: one published system, one readable file. `load_method` finds them by entry point."""

from fedmoe_ds.methods.base import Method, MethodParams, load_method, with_defaults

__all__ = ["Method", "MethodParams", "load_method", "with_defaults"]
