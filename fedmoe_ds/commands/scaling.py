"""Scaling: a study over ranks, ep_size, clients, experts or k as runs of launch/train.py, resumable, with tables and plots.

    fedmoe scaling --config configs/scaling/weak.yaml [key=value ...]

Runs live in <output>/<axis>-<value>-r<repeat>, their resolved configurations, messages and machine beside them (.yaml, .log,
.machine.json). One group of ranks runs at a time: the deepspeed launcher starts it on this machine, srun inside a SLURM
allocation. Started again, the same command leaves finished runs alone and continues the others; SIGINT, SIGTERM or SIGUSR1
stops it with a checkpoint. It writes scaling.csv, scaling.md and scaling.svg; docs/scaling.md defines every figure.

For a SLURM array: --points lists the points, one line `index label ranks` each; --point I runs one; --collect only reads.
Exit code: 0 when every run is finished; 2 for a mistake in the input; 75 when it was asked to stop, 76 when a rank was lost
(the same command continues); otherwise 1.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedmoe_ds.terminal import note, show


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, for instance federation.rounds=20")
    parser.add_argument("--config", type=Path, required=True, help="study file, or the name of one of the package")
    parser.add_argument("--output", type=Path, help="folder of all runs (default: runs/scaling/<name of the study>)")
    parser.add_argument("--hardware", metavar="FILE", help="calibration of the planner, for the predicted columns")
    parser.add_argument("--report", type=Path, help="write the text (.md) and the picture beside it here too")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--points", action="store_true", help="list the points and start nothing")
    task.add_argument("--point", type=int, metavar="I", help="run this point and collect nothing")
    task.add_argument("--collect", action="store_true", help="start nothing; write the outputs from what is there")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    # Copied before the next line: the runs get the user's own choice of accelerator.
    environment = dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # this process trains nothing; the runs choose for themselves
    from fedmoe_ds.studies.scaling import Request, scale

    code, text = scale(Request(**vars(args)), Path(__file__).with_name("train.py"), environment, note)
    # --point collects nothing.
    if text:
        show(text)
    return code


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("scaling")
