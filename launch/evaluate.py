"""Evaluate: `python launch/evaluate.py RUN|CHECKPOINT|MODEL [--data FILE] [key=value ...]`; --help says the rest."""

from __future__ import annotations

from fedmoe_ds.distributed.stop_request import leave_on_interrupt

leave_on_interrupt()  # before the imports that take seconds

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported

from fedmoe_ds.distributed.runtime import run_entry
from fedmoe_ds.results.evaluate_command import main

if __name__ == "__main__":
    run_entry(main)
