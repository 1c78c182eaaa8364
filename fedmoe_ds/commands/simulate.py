"""Simulate: a whole federation on paper: `fedmoe simulate --config C --ranks 10000 --clients 10000000 --participants 20000`.

The planner's models and the run's own sampling and schedule, with synthetic clients: no weights, no data, one process. Prints
rounds per hour, bytes by class of links, memory per rank and host, what failures and checkpoints cost, and the next walls; with
--curve a row for each of several numbers of ranks, clients or participants. What is assumed is printed, too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedmoe_ds.commands.options import check_counts, config_options, world_options
from fedmoe_ds.config import Config, load_config
from fedmoe_ds.terminal import show, visible


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config_options(parser, "topology.ep_size=8")
    world_options(parser)
    parser.add_argument("--clients", type=int, help="of the federation (default: data.partition.clients)")
    parser.add_argument("--participants", type=int, help="of a round (default: federation.participation of the clients)")
    parser.add_argument("--rounds", type=int, help="of the run (default: federation.rounds)")
    parser.add_argument("--samples", type=float, help="mean samples of a client (default: 100)")
    parser.add_argument("--sigma", type=float, help="of their logarithm, which is normal; 0: all equal (default: 1)")
    parser.add_argument("--mtbf-hours", type=float, help="mean time between failures of one host (default: 6300)")
    parser.add_argument("--checkpoint-every", type=int, metavar="ROUNDS", help="instead of checkpoint.every")
    parser.add_argument("--storage-gb-per-s", type=float, help="of the shared file system, for the job (default: 10)")
    parser.add_argument("--restart-minutes", type=float, help="from a failure to reading weights (default: 10)")
    parser.add_argument("--sampled", type=int, help="rounds that stand for all (default: 3)")
    parser.add_argument("--curve", nargs="+", metavar="WORD", help="`ranks`, `clients` or `participants`, then its values")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_intermixed_args(argv)  # overrides may stand between the options


def main(argv: list[str]) -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported; nothing is computed on a device
    args = parse(argv)
    check_counts(args, "nodes", "gpus_per_node", "ranks", "clients", "participants", "rounds", "checkpoint_every", "sampled")
    config = _config(args)
    from fedmoe_ds.bench.harness.table import check_writable, write_json
    from fedmoe_ds.planner import load_hardware
    from fedmoe_ds.planner.world import world_of
    from fedmoe_ds.simulation import Setting, simulate
    from fedmoe_ds.simulation.curve import Curve, figures
    from fedmoe_ds.simulation.text import lines

    names = ("clients", "participants", "samples", "sigma", "mtbf_hours", "storage_gb_per_s", "restart_minutes", "sampled")
    setting = Setting(**{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    curve = Curve.parse(args.curve) if args.curve else None
    check_writable(args.json)
    hardware = load_hardware(args.hardware)
    world = world_of(args.nodes, args.gpus_per_node, args.ranks, hardware)
    if curve is None:
        found = simulate(config, world, hardware, setting)
        shown, data = lines(found), figures(found)
    else:
        several = list(curve.points(config, world, hardware, setting))
        shown, data = curve.lines(several), {"curve": curve.data(several)}
    show("\n".join(map(visible, shown)))
    if args.json is not None:
        write_json(data, args.json)
    return 0


def _config(args: argparse.Namespace) -> Config:
    """The configuration; options that are keys of it win."""
    overrides = list(args.overrides)
    if args.rounds is not None:
        overrides.append(f"federation.rounds={args.rounds}")
    if args.checkpoint_every is not None:
        overrides.append(f"checkpoint.every={args.checkpoint_every}")
    return load_config(args.config, overrides)


if __name__ == "__main__":
    from fedmoe_ds.commands.program import start

    start("simulate")
