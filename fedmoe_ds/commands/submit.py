"""Submit: a run as a SLURM job: `fedmoe submit --config my.yaml --nodes 4 --gpus-per-node 8 [key=value ...]`.

Checks the configuration for so many ranks, writes <output>/slurm/<name>.sbatch from slurm/train.sbatch, and submits it. A
mistake is one line and exit code 2, before anything is written or submitted. Prints the job's number and where its files are.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedmoe_ds.terminal import show, visible


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance federation.rounds=20")
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file, or the name of one of the package (`fedmoe configs`)"
    )
    parser.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--gpus-per-node", type=int, help="one rank per GPU")
    ranks.add_argument("--tasks-per-node", type=int, help="ranks per node without GPUs (default: 1)")
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
    from fedmoe_ds.planner.slurm import Request, check, compose, log_folder, submit

    options = vars(args)
    dry_run, home = options.pop("dry_run"), Path(__file__).resolve().parents[2]
    request = Request(**options)
    if dry_run:
        config = check(request)
        show(compose(request, config, home, log_folder(config)).removesuffix("\n"))
        return 0
    done = submit(request, home, environment)
    show("\n".join(visible(f"{name}: {value}") for name, value in vars(done).items()))
    return 0


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("submit")
