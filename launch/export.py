"""Export: one of a run's models in a format that other tools load; `fedmoe_ds/export/command.py` says how.

python launch/export.py RUN --format peft|peft-fused|merged [--round N] [--tier K | --client NAME] [--out DIR]
"""

from __future__ import annotations

from fedmoe_ds.distributed.stop_request import leave_on_interrupt

leave_on_interrupt()  # before the imports that take seconds

from fedmoe_ds.distributed.runtime import run_entry
from fedmoe_ds.export.command import main

if __name__ == "__main__":
    run_entry(main)
