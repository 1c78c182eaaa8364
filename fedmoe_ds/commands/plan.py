"""Plan: `fedmoe plan --config C --nodes 16 --gpus-per-node 8 --gpu h200 [key=value ...]`.

Prints, before anything is queued, what a run would take: memory per rank, bytes and seconds of a round, the best topology,
FLOPs per tier, hours of the whole study. Loads no weights; a model folder with only config.json is enough.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe_ds.config import Config, load_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.terminal import show, visible

if TYPE_CHECKING:
    from fedmoe_ds.planner import Hardware


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance topology.ep_size=8")
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file, or the name of one of the package (`fedmoe configs`)"
    )
    parser.add_argument("--nodes", type=int, help="hosts (default: as many as --ranks needs, else 1)")
    parser.add_argument("--gpus-per-node", type=int, help="ranks per host (default: devices of the machine in the table)")
    parser.add_argument("--ranks", type=int, help="ranks in all, instead of --nodes")
    parser.add_argument("--gpu", "--hardware", dest="hardware", default="h200", metavar="NAME|FILE",
                        help="a machine of the table, or a file of `fedmoe bench calibrate` (default: h200)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="repetitions of the run in the study")
    parser.add_argument("--verify", action="store_true",
                        help="also build the world's process groups and control plane in this process, as some of its "
                        "ranks, compare them with the layout and count open files; nothing is sent")  # fmt: skip
    parser.add_argument("--verify-all", action="store_true", help="the same as all of its ranks, one after the other")
    parser.add_argument("--no-search", action="store_true", help="do not try other topologies")
    parser.add_argument("--models", type=Path, nargs="+", metavar="FOLDER",
                        help="plan the configuration for each of these models instead, in the worlds of --sizes")  # fmt: skip
    parser.add_argument("--sizes", type=int, nargs="+", metavar="RANKS", default=[1, 8, 64, 1024],
                        help="numbers of ranks of --models (default: 1 8 64 1024)")  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_intermixed_args(argv)  # overrides may stand between the options


def main(argv: list[str]) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported; a plan computes nothing on a device
    args = parse(argv)
    config = load_config(args.config, args.overrides)
    from fedmoe_ds.bench.harness.table import check_writable, write_json
    from fedmoe_ds.planner import load_hardware
    from fedmoe_ds.planner.plan import plan
    from fedmoe_ds.planner.world import world_of

    for name in ("nodes", "gpus_per_node", "ranks", "seeds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value}: must be 1 or more")
    # Before a search that may take minutes.
    check_writable(args.json)
    hardware = load_hardware(args.hardware)
    if args.models is not None:
        return _several(args, config, hardware)
    world = world_of(args.nodes, args.gpus_per_node, args.ranks, hardware)
    verified = "all" if args.verify_all else "sample" if args.verify else None
    found = plan(config, world, hardware, args.seeds, verified, not args.no_search)
    show("\n".join(map(visible, found.lines())))
    if args.json is not None:
        write_json(found.data(), args.json)
    return 0


def _several(args: argparse.Namespace, config: Config, hardware: Hardware) -> int:
    """A table of models and worlds."""
    from fedmoe_ds.bench.harness.table import write_json
    from fedmoe_ds.planner.models import lines, plan_models

    for count in args.sizes:
        if count < 1:
            raise UserError(f"--sizes: {count}: must be 1 or more")
    plans = list(plan_models(config, args.models, args.sizes, hardware))
    show("\n".join(map(visible, lines(plans, hardware))))
    if args.json is not None:
        write_json({"plans": [plan.data() for plan in plans]}, args.json)
    return 0


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("plan")
