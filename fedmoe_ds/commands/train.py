"""Train: `deepspeed launch/train.py --config configs/quickstart.yaml [key=value ...]`.

Runs under plain python, deepspeed, torchrun, mpirun and srun; ranks and groups come from the launcher's environment. Or start
the ranks of one machine from here, and start them again when one is lost: `--ranks 8 --max-restarts 3`.
Exit codes: 0 finished, 2 a mistake in the input, 75 stopped with a checkpoint, or while loading, 76 a rank was lost (the last
checkpoint is intact); after 75 and 76 the same command with --resume auto continues.
`--log run.log` keeps what is said, with the time; `--log run-%r.log` one file per rank.
"""

from __future__ import annotations

if __name__ == "__main__":
    # The script that launchers start: signals are heard before the imports below, which take a second where files are cold.
    from fedmoe_ds.commands.program import start

    start("train")

import argparse
from pathlib import Path

from fedmoe_ds.commands.console import logging_options, show_ending, start_console
from fedmoe_ds.commands.options import config_options
from fedmoe_ds.commands.program import STOP
from fedmoe_ds.config import Config, load_config
from fedmoe_ds.distributed.launcher import Launch, detect_launch, known_rank
from fedmoe_ds.errors import UserError
from fedmoe_ds.terminal import note, show


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    config_options(parser, "federation.rounds=20")
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: continue where the run stopped")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--dry-run", action="store_true", help="print topology, schedule and memory; train nothing")
    parser.add_argument("--ranks", type=int, help="with --dry-run: plan for so many; else: start so many on this machine")
    parser.add_argument("--max-restarts", type=int, help="with --ranks: start again so often when a rank is lost (default: 0)")
    logging_options(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    start_console(args, known_rank())  # before anything is said
    launch = detect_launch()
    config = load_config(args.config, args.overrides)
    if args.print_config or args.dry_run:
        # Under a launcher every rank comes here; one of them prints.
        if launch.rank == 0:
            from fedmoe_ds.planner.dry_run import describe, resolved

            lines = [resolved(config)] if args.print_config else describe(config, args.ranks or launch.world_size)
            show("\n".join(lines))
        return 0
    if args.ranks is not None or args.max_restarts is not None:
        return supervise(args, argv, config, launch)
    from fedmoe_ds.distributed.runtime import init_runtime

    runtime = init_runtime(launch, config.topology, config.execution.threads)
    STOP.begun()  # a signal is remembered from here on, and served as soon as there is something to save
    # Imports DeepSpeed, which reads the choice of accelerator that init_runtime has made.
    from fedmoe_ds.federation.session import train

    ending = train(config, runtime, args.resume, STOP)
    if runtime.is_main:
        show_ending(ending.lines)  # before the barrier: what the launcher cuts off must be out already
    runtime.barrier()  # a launcher may end everybody as soon as one rank has left
    return ending.exit_code


def supervise(args: argparse.Namespace, argv: list[str], config: Config, launch: Launch) -> int:
    """Start the ranks from here."""
    from fedmoe_ds.checkpoint.skipped_clients import findings_of
    from fedmoe_ds.distributed.supervisor import Supervisor, restartable_command

    ranks, restarts = 1 if args.ranks is None else args.ranks, args.max_restarts or 0
    if launch.launcher != "python":
        raise UserError(f"--ranks: {ranks}: {launch.launcher} has started the ranks already; drop --ranks and --max-restarts")
    if ranks < 1:
        raise UserError(f"--ranks: {ranks}: must be at least 1")
    if restarts < 0:
        raise UserError(f"--max-restarts: {restarts}: must be at least 0")
    STOP.begun()  # the supervisor listens itself
    command = restartable_command(__file__, argv)
    folder = Path(config.output) / config.name
    return Supervisor(command, ranks, restarts, config.topology.silence_s, note, learnt=lambda: findings_of([folder])).run()
