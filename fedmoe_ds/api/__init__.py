"""What Python programs and notebooks call: `fedmoe_ds.run` and what belongs to it (docs/python.md). Imports no torch."""

from fedmoe_ds.api.configuration import Given, load_config, plan
from fedmoe_ds.api.result import Result, open_run
from fedmoe_ds.api.running import run

__all__ = ["Given", "Result", "load_config", "open_run", "plan", "run"]
