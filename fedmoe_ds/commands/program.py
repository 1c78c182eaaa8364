"""Program: `fedmoe`, its subcommands by name, and how each of them begins, whoever starts it.

A subcommand begins in one of three ways: `fedmoe train`, `launch/train.py` (the script that deepspeed, srun and mpirun take; of
an installed package it is the one that `fedmoe launch-path train` prints), or `python -m fedmoe_ds.commands train`. All three
come to `start`. Modules of subcommands are imported there and not here: the list of them costs no second.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedmoe_ds import __version__
from fedmoe_ds.distributed.stop_request import StopRequest, leave_on_interrupt, unwind_on_interrupt
from fedmoe_ds.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, nearest
from fedmoe_ds.terminal import note, show

STOP = StopRequest()
"""Of `train` and `prepare`. It hears nothing before `start` has installed it."""
HELP = ("-h", "--help")
LAUNCHED = "train"
"""The one subcommand whose ranks a launcher starts."""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: has `main(argv)`, which returns the exit code.
        summary: one line for the list.
        listen: what is done about signals, before the imports that take seconds.
        light: it answers at once: there are no such imports, and no ranks.
        on_cpu: it computes in one process, on the CPU, and starts no other.
    """

    module: str
    summary: str
    listen: Callable[[], object] = leave_on_interrupt
    light: bool = False
    on_cpu: bool = False


COMMANDS = {
    "train": Command("fedmoe_ds.commands.train", "fine-tune a federation, on any launcher's ranks", STOP.install),
    "report": Command("fedmoe_ds.commands.report", "the page of a run, or of several side by side", light=True),
    "evaluate": Command("fedmoe_ds.results.evaluate_command", "score a run, a checkpoint or a model folder", on_cpu=True),
    "generate": Command("fedmoe_ds.results.generate_command", "what a run's model answers", on_cpu=True),
    "export": Command("fedmoe_ds.export.command", "a run's model as other tools load it: LoRA or whole", on_cpu=True),
    "plan": Command("fedmoe_ds.commands.plan", "memory, time and the best topology of a run, before it is queued"),
    "simulate": Command("fedmoe_ds.commands.simulate", "a federation of any size on paper: rates, failures, walls"),
    "prepare": Command("fedmoe_ds.commands.prepare", "do before a job what its start would do", STOP.install, on_cpu=True),
    "submit": Command("fedmoe_ds.commands.submit", "check a run and submit it to SLURM"),
    "compare": Command("fedmoe_ds.commands.compare", "methods x seeds as runs, and one report about all of them"),
    "scaling": Command("fedmoe_ds.commands.scaling", "a study over ranks, ep_size, clients, experts or k"),
    "bench": Command("fedmoe_ds.commands.bench", "measure speed and memory, beside peers and floors"),
    "cache": Command("fedmoe_ds.commands.cache", "list or clean what runs have kept to start faster", light=True),
    "configs": Command("fedmoe_ds.commands.configs", "list the configurations that come with the package", light=True),
    "launch-path": Command(
        "fedmoe_ds.commands.launch_path", "where the script is that deepspeed, srun and mpirun start", light=True
    ),
}
"""In the order of the list."""


def main() -> NoReturn:
    """`fedmoe SUBCOMMAND ...`."""
    words = sys.argv[1:]
    if not words or words[0] in HELP:
        show(overview())
        sys.exit(0 if words else EXIT_USER_ERROR)
    if words[0] == "--version":
        show(f"fedmoe-ds {__version__}")
        sys.exit(0)
    if words[0] not in COMMANDS:
        sys.exit(_told(lambda: refuse(words[0])))
    # What argparse calls the program in its usage.
    sys.argv = [f"fedmoe {words[0]}", *words[1:]]
    start(words[0])


def overview() -> str:
    """What `fedmoe --help` shows."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    head = "Federated fine-tuning of sparse mixture-of-experts models on DeepSpeed expert parallelism."
    tail = "`fedmoe SUBCOMMAND --help` has its options, `fedmoe --version` the version."
    return "\n".join(["usage: fedmoe SUBCOMMAND ...", "", head, "", *lines, "", tail])


def refuse(name: str) -> NoReturn:
    """Raises UserError for a subcommand that there is not, with the nearest."""
    raise UserError(f"fedmoe: {name}: no such subcommand{nearest(name, COMMANDS)}")


def start(name: str) -> NoReturn:
    """Run a subcommand with the arguments of this process, and end it."""
    command, words = COMMANDS[name], sys.argv[1:]
    command.listen()
    _forget_own_folder()
    if command.on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed when it is imported
    if command.light or any(word in HELP for word in _before_dashes(words)):
        # argparse shows its text and ends: nothing of what `run_entry` brings is needed for that.
        sys.exit(_told(lambda: _main_of(command)(words)))
    from fedmoe_ds.distributed.runtime import run_entry  # brings torch: seconds

    run_entry(lambda: _main_of(command)(words))


def _told(answer: Callable[[], int]) -> int:
    """The exit code of what takes no time; a mistake is one line."""
    unwind_on_interrupt()
    try:
        return answer()
    except UserError as error:
        note(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        note("error: stopped by SIGINT")
        return EXIT_INTERRUPTED


def _main_of(command: Command) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = importlib.import_module(command.module).main
    return main


def _before_dashes(words: list[str]) -> list[str]:
    """Without what follows `--`: those are no options."""
    return words[: words.index("--")] if "--" in words else words


def _forget_own_folder() -> None:
    """Python looks for modules beside a script first, and what somebody imports as `cache` or `evaluate` is none of ours."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and sys.path and Path(sys.path[0]).resolve() == Path(script).resolve().parent:
        del sys.path[0]
