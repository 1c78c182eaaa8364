"""Plan: `fedmoe plan --config C --nodes 16 --gpus-per-node 8 --gpu h200 [key=value ...]`.

Prints, before anything is queued, what a run would take: memory per rank, bytes and seconds of a round, the best topology,
FLOPs per tier, hours of the whole study. Loads no weights; a model folder with only config.json is enough.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe_ds.commands.options import check_counts, config_options, world_options
from fedmoe_ds.config import Config, load_config
from fedmoe_ds.terminal import show, visible

if TYPE_CHECKING:
    from fedmoe_ds.planner import Hardware


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_options(parser, "topology.ep_size=8")
    world_options(parser)
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

    check_counts(args, "nodes", "gpus_per_node", "ranks", "seeds", *(["sizes"] if args.models is not None else []))
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

    plans = list(plan_models(config, args.models, args.sizes, hardware))
    show("\n".join(map(visible, lines(plans, hardware))))
    if args.json is not None:
        write_json({"plans": [plan.data() for plan in plans]}, args.json)
    return 0


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("plan")
