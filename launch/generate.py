"""Generate: what a run's model answers; `--help` lists the options (fedmoe_ds/results/generate_command.py)."""

from __future__ import annotations

from fedmoe_ds.distributed.stop_request import leave_on_interrupt

leave_on_interrupt()  # before the imports that take seconds

import os

from fedmoe_ds.distributed.runtime import run_entry


def main() -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from fedmoe_ds.results.generate_command import main as generate

    return generate()


if __name__ == "__main__":
    run_entry(main)
