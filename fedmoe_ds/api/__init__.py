"""What Python programs and notebooks call: `fedmoe_ds.run` and what belongs to it (docs/python.md). Imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmoe_ds.api.configuration import Given, load_config, plan
    from fedmoe_ds.api.result import Result, open_run
    from fedmoe_ds.api.running import run

__all__ = ["Given", "Result", "load_config", "open_run", "plan", "run"]

_PLACES = {"run": "running", "Result": "result", "open_run": "result"}
_PLACES |= dict.fromkeys(("Given", "load_config", "plan"), "configuration")


def __getattr__(name: str) -> Any:
    # Late: the worker's process imports this package before it listens to signals.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
