"""Prepare: what a start does before its first round, done before the job: `fedmoe prepare --config my.yaml [key=value ...]`.

One process, on the CPU, into the cache (`foundation.cache`), which has to lie where the job's hosts see it: the foundation is
found, downloaded, converted or pre-trained; data are read, encoded, dealt and stored; the sums of the model's files are taken.
For a job on CPUs, `--ranks N` also writes the weights that N ranks of a host map. A start with the same keys finds all of it.
Exit codes: 0 done, 2 a mistake in the input, 75 stopped (pre-training and whole entries are kept; the same command continues).
"""

from __future__ import annotations

import argparse

from fedmoe_ds.commands.options import config_options
from fedmoe_ds.commands.program import STOP
from fedmoe_ds.config import load_config
from fedmoe_ds.distributed.launcher import known_rank
from fedmoe_ds.errors import EXIT_STOPPED, UserError
from fedmoe_ds.terminal import note, show, visible


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_options(parser, "data.sequence_length=1024")
    parser.add_argument("--ranks", type=int, default=1, help="ranks that each host of a job on CPUs will have (default: 1)")
    return parser.parse_intermixed_args(argv)  # overrides may stand between the options


def main(argv: list[str]) -> int:
    args = parse(argv)
    if known_rank() > 0:
        raise UserError("prepare: one process does all of it, and a launcher has started several; start it without one")
    if args.ranks < 1:
        raise UserError(f"--ranks: {args.ranks}: must be at least 1")
    config = load_config(args.config, args.overrides)
    from fedmoe_ds.distributed.stop_points import StopError, heard_by
    from fedmoe_ds.federation.preparation import prepare

    STOP.begun()  # a signal is remembered from here on, and heard between two steps

    def listen() -> None:
        if STOP.name is not None:
            raise StopError(STOP.name)

    try:
        with heard_by(listen):
            for line in prepare(config, args.ranks, note):
                show(visible(line))
    except StopError as stopped:
        note(f"{stopped}; start the same command again to continue")
        return EXIT_STOPPED
    return 0


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("prepare")
