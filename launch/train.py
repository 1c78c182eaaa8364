"""Train: `deepspeed launch/train.py --config configs/quickstart.yaml [key=value ...]`.

Runs under plain python, deepspeed, torchrun, mpirun and srun; ranks and groups come from the launcher's environment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedmoe_ds.config import load_config
from fedmoe_ds.launcher import detect_launch
from fedmoe_ds.runtime import init_runtime, run_entry


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance federation.rounds=20")
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: continue where the run stopped")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="print topology, schedule and memory; train nothing")
    parser.add_argument("--ranks", type=int, help="with --dry-run: plan for this many ranks; default: those of the launcher")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def main() -> int:
    args = parse()
    launch = detect_launch()
    config = load_config(args.config, args.overrides)
    if args.print_config or args.dry_run:
        if launch.rank == 0:
            from fedmoe_ds.plan import describe, resolved

            lines = [resolved(config)] if args.print_config else describe(config, args.ranks or launch.world_size)
            sys.stdout.write("\n".join(lines) + "\n")
        return 0
    runtime = init_runtime(launch, config.topology, config.execution.threads)
    from fedmoe_ds.session import train  # imports DeepSpeed, which reads the choice of accelerator that was made above

    ending = train(config, runtime, args.resume)
    if runtime.is_main:
        sys.stdout.write("\n".join(ending.lines) + "\n")
        sys.stdout.flush()
    runtime.barrier()  # a launcher may end everybody as soon as one rank has left
    return ending.exit_code


if __name__ == "__main__":
    run_entry(main)
