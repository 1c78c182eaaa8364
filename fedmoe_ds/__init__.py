"""fedmoe-ds: federated fine-tuning of sparse mixture-of-experts models at cluster scale, on DeepSpeed expert parallelism.

    result = fedmoe_ds.run("quickstart", "federation.rounds=2")

The names below, `fedmoe_ds.methods` and `fedmoe_ds.testing` stay; every other module may move (docs/python.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmoe_ds.api import Result, load_config, open_run, plan, run
    from fedmoe_ds.errors import LostError, UserError

__version__ = "0.1.0"
__all__ = ["LostError", "Result", "UserError", "__version__", "load_config", "open_run", "plan", "run"]

_PLACES = dict.fromkeys(("Result", "load_config", "open_run", "plan", "run"), "fedmoe_ds.api")
_PLACES |= {"LostError": "fedmoe_ds.errors", "UserError": "fedmoe_ds.errors"}


def __getattr__(name: str) -> Any:
    # Late: every command imports this package first, and most of them need none of it.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
