"""Options: what several subcommands ask for in the same words: a configuration, a world and its machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedmoe_ds.errors import UserError


def config_options(parser: argparse.ArgumentParser, example: str) -> None:
    """Add `--config` and overrides.

    Args:
        example: of an override, for the help.
    """
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"for instance {example}")
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file, or the name of one of the package (`fedmoe configs`)"
    )


def world_options(parser: argparse.ArgumentParser) -> None:
    """Add what `planner.world.world_of` and `planner.load_hardware` take."""
    parser.add_argument("--nodes", type=int, help="hosts (default: as many as --ranks needs, else 1)")
    parser.add_argument("--gpus-per-node", type=int, help="ranks per host (default: devices of the machine in the table)")
    parser.add_argument("--ranks", type=int, help="ranks in all, instead of --nodes")
    parser.add_argument("--gpu", "--hardware", dest="hardware", default="h200", metavar="NAME|FILE",
                        help="a machine of the table, or a file of `fedmoe bench calibrate` (default: h200)")  # fmt: skip


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError where one of these options is given a number below 1."""
    for name in names:
        given = getattr(args, name)
        # Some options take several numbers; what is not given says nothing.
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: {value}: must be 1 or more")
