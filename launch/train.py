"""Train: `deepspeed launch/train.py --config configs/quickstart.yaml [key=value ...]`.

Runs under plain python, deepspeed, torchrun, mpirun and srun; ranks and groups come from the launcher's environment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedmoe_ds.runtime import run_entry


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, for instance federation.rounds=20"
    )
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument(
        "--resume", choices=("never", "auto"), default="never", help="auto: continue from the newest intact checkpoint"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="print topology, schedule and memory estimate; train nothing"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def main() -> int:
    args = parse()
    from fedmoe_ds.config import load_config

    config = load_config(args.config, args.overrides)
    from fedmoe_ds import session
    from fedmoe_ds.runtime import init_runtime

    if args.print_config:
        text = session.resolved(config)
        sys.stdout.write(text)
        return 0
    runtime = init_runtime(config.topology.device, config.execution.threads, config.topology.timeout_s)
    run = session.dry_run if args.dry_run else session.train
    lines = run(config, runtime, args.resume)
    if runtime.is_main:
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    run_entry(main)
