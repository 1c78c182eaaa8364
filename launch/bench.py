"""Measure: `python launch/bench.py wave` (speed against transformers + PEFT), `load` (memory per rank), `experts` (pool size),
`aggregate` (the sums of a round), `calibrate` (this machine, for launch/plan.py), `plan` (the planner against real runs).

Everything runs on one CPU thread per process. Absolute numbers depend on the machine; ratios inside one run are what counts.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from fedmoe_ds.runtime import run_entry


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    wave = commands.add_parser("wave", help="the same clients, model, data and steps through every system")
    wave.add_argument("--shape", nargs="+", default=["e32", "e64"], help="e32, e64 or tiny (default: e32 e64)")
    wave.add_argument("--steps", type=int, default=2, help="local steps per client in a timed wave")
    wave.add_argument("--rounds", type=int, default=3, help="alternating repeats; medians are reported")
    wave.add_argument("--mode", default="both", help="ours: fast, bitwise or both")
    wave.add_argument("--peers", nargs="*", default=["eager", "grouped_mm"], help="experts implementations of transformers")
    wave.add_argument("--sequences", type=int, default=1, help="sequences per client and step")
    wave.add_argument("--length", type=int, default=128, help="tokens per sequence")
    load = commands.add_parser("load", help="peak host memory per rank while a model is loaded")
    load.add_argument("--ep-size", type=int, nargs="+", default=[1, 2, 4], help="expert-parallel sizes")
    load.add_argument("--shape", default="load", help="load (about 600 MiB) or load-tiny")
    experts = commands.add_parser("experts", help="a client step with few and with many adapter experts (FFT-MoE)")
    experts.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256], help="pool sizes per layer")
    experts.add_argument("--steps", type=int, default=4, help="local steps per client in a timed wave")
    experts.add_argument("--rounds", type=int, default=3, help="alternating repeats; medians are reported")
    experts.add_argument("--clients", type=int, default=8, help="clients in flight")
    experts.add_argument("--sequences", type=int, default=4, help="sequences per client and step")
    experts.add_argument("--length", type=int, default=128, help="tokens per sequence")
    experts.add_argument("--bitwise", action="store_true", help="one client per pass, as reproducible=bitwise runs them")
    aggregate = commands.add_parser("aggregate", help="the sums of a round over torch and over MPI, against copying memory")
    aggregate.add_argument("--ranks", type=int, default=2, help="processes, one cluster each")
    aggregate.add_argument("--mib", type=int, nargs="+", default=[1, 16, 128], help="sizes of the sums")
    aggregate.add_argument("--rounds", type=int, default=7, help="repeats; medians are reported")
    calibrate = commands.add_parser("calibrate", help="measure this machine for launch/plan.py --hardware FILE")
    plan = commands.add_parser("plan", help="predicted beside measured round time and memory of real runs")
    plan.add_argument("--hardware", type=Path, help="a file of `calibrate`; default: calibrate first")
    plan.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default: 1 2 4)")
    plan.add_argument("--case", nargs="+", default=["short", "narrow", "long"], help="shapes (default: all three)")
    plan.add_argument("--rounds", type=int, default=3, help="rounds of every run; the first one warms up and is not compared")
    for command in (aggregate, wave, load, experts):
        command.add_argument("--seed", type=int, default=0)
    for command in (aggregate, wave, load, experts, calibrate, plan):
        command.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.command in ("calibrate", "plan"):
        from fedmoe_ds.bench import planned_command

        sys.stdout.write(planned_command.run(args.command, args, note) + "\n")
        return 0
    from fedmoe_ds.bench import aggregate, load, pool, pool_workload, table, wave

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # an ordinary end: children are ended, too
    table.check_writable(args.json)
    if args.command == "wave":
        settings = {name: getattr(args, name) for name in ("steps", "sequences", "length", "seed")}
        workloads = wave.make_workloads(args.shape, **settings)
        rows = wave.run_wave(workloads, wave.system_names(args.mode, args.peers), args.rounds, note)
        text = table.wave_table(rows)
    elif args.command == "aggregate":
        rows = aggregate.run_aggregate(args.ranks, args.mib, args.rounds)
        text = table.aggregate_table(rows)
    elif args.command == "experts":
        names = ("steps", "clients", "sequences", "length", "seed", "bitwise")
        workload = pool_workload.PoolWorkload(**{name: getattr(args, name) for name in names})
        rows = pool.run_pool(args.experts, workload, args.rounds, note)
        text = table.pool_table(rows)
    else:
        rows = load.run_load(args.ep_size, args.shape, args.seed, note)
        text = table.load_table(rows)
    sys.stdout.write(text + "\n")
    if args.json is not None:
        table.write_json(rows, args.json)
    return 0


def note(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    run_entry(main)
