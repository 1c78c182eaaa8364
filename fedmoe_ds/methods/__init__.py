"""Methods: one published system, one readable file. `method_for` finds them by entry point."""

from fedmoe_ds.methods.base import Card, Facts, Method, MethodParams, Situation
from fedmoe_ds.methods.registry import load_method, method_for, method_names, with_defaults

__all__ = ["Card", "Facts", "Method", "MethodParams", "Situation", "load_method", "method_for", "method_names", "with_defaults"]
