"""Submit: a run as a SLURM job: `fedmoe submit --config my.yaml --nodes 4 --gpus-per-node 8 [key=value ...]`.

Checks the configuration for so many ranks, writes <output>/slurm/<name>.sbatch from slurm/train.sbatch, and submits it. A
mistake is one line and exit code 2, before anything is written or submitted. No data are read for it. Prints the job's
number and where its files are.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fedmoe_ds.commands.options import config_options
from fedmoe_ds.errors import UserError
from fedmoe_ds.terminal import note, show, visible


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_options(parser, "federation.rounds=20")
    parser.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--gpus-per-node", metavar="[TYPE:]N", help="one rank per GPU; a type as the site calls it: a100:8")
    ranks.add_argument("--tasks-per-node", type=int, help="ranks per node without GPUs (default: 1)")
    cores = parser.add_mutually_exclusive_group()
    cores.add_argument("--cpus-per-task", type=int, help="cores per rank (default: execution.threads, beside a GPU 4)")
    cores.add_argument("--cpus-per-gpu", type=int, help="the same on sites that count cores by GPU")
    parser.add_argument("--mem", help="memory per node as sbatch takes it (default: what the planner says)")
    parser.add_argument(
        "--hardware", help="what the job must fit into, and how long a wave takes: a name or file as for `fedmoe plan`"
    )
    parser.add_argument("--partition")
    parser.add_argument("--time", help="limit as sbatch takes it, for instance 24:00:00")
    parser.add_argument("--account")
    parser.add_argument("--sbatch", action="append", default=[], metavar="key=value", help="any other option of sbatch")
    parser.add_argument("--dry-run", action="store_true", help="check, print the script, write and submit nothing")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    # Copied before the next line: sbatch passes it on to the job.
    environment = dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # this process trains nothing; the job chooses for itself
    from fedmoe_ds.planner.batch_job import Request, check
    from fedmoe_ds.planner.slurm import compose, log_folder, submit

    options = vars(args)
    dry_run, home = options.pop("dry_run"), Path(__file__).resolve().parents[2]
    request = Request(**options | gpus_asked(options["gpus_per_node"]))
    if dry_run:
        found = check(request, environment)
        show(compose(request, found, home, log_folder(found.config)).removesuffix("\n"))
        notes = found.notes
    else:
        done = submit(request, home, environment)
        places, notes = {name: value for name, value in vars(done).items() if name != "notes"}, done.notes
        show("\n".join(visible(f"{name}: {value}") for name, value in places.items()))
    for line in filter(None, notes):
        note(visible(line))
    return 0


def gpus_asked(text: str | None) -> dict[str, Any]:
    """`a100:4` and `4`, as fields of a request. Raises UserError."""
    if text is None:
        return {}
    kind, _, count = text.rpartition(":")
    if not count.lstrip("-").isdecimal():
        raise UserError(f"--gpus-per-node: {text}: is no number of them; write 4, or with a type a100:4")
    return {"gpus_per_node": int(count), "gpu_type": kind or None}


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("submit")
