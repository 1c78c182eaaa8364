"""What a run has learnt, opened in one process: evaluated, asked, and handed to `fedmoe_ds.export`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmoe_ds.results.trained_run import Selection, TrainedRun, open_run

__all__ = ["Selection", "TrainedRun", "open_run"]


def __getattr__(name: str) -> Any:
    # Late: the help of a command in here needs no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fedmoe_ds.results.trained_run"), name)
