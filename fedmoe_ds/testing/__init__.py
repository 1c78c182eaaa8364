"""For authors of methods: a federation that runs in a second, and a check of a method on it (docs/python.md)."""

from fedmoe_ds.testing.method_check import MethodError, check_method
from fedmoe_ds.testing.tiny_federation import tiny_federation

__all__ = ["MethodError", "check_method", "tiny_federation"]
