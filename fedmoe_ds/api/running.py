"""Running: a run from a Python program, in its own process or in processes that are started for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedmoe_ds.api.configuration import Given, check_ranks, load_config
from fedmoe_ds.api.result import Result
from fedmoe_ds.api.started import start
from fedmoe_ds.config import Config
from fedmoe_ds.errors import UserError

if TYPE_CHECKING:
    from fedmoe_ds.distributed.runtime import Runtime
    from fedmoe_ds.distributed.stop_request import StopRequest

Resume = Literal["never", "auto"]


def run(
    config: Given, *overrides: str, resume: Resume = "never", ranks: int | None = None, max_restarts: int | None = None
) -> Result:
    """Run a federation to its end; the same bits and the same files as `launch/train.py`.

    In this process and alone; in a process that a launcher has started, as its rank of the launcher's world; with `ranks`, in
    so many new processes on this machine, and this one waits.

    Ctrl-C ends it after the wave that is running, with a checkpoint, and is then a KeyboardInterrupt; pressed again, at once.
    SIGTERM and SIGUSR1 end it in the same way with a result that says so (`Result.interrupted`). Handlers that the program has
    set itself are left alone; outside of the main thread no signal is heard.

    Args:
        config: a YAML file, the name of a configuration of the package, a dict of its sections, or a `Config`.
        overrides: `key=value`, as on the command line.
        resume: `never` refuses a folder that holds a run; `auto` continues it, or begins.
        ranks: processes to start; None: none.
        max_restarts: with `ranks`: how often to start again, from the last checkpoint, when a rank is lost.
    Raises:
        UserError: one line about a mistake in the configuration, the data or the environment.
        LostError: a rank died or lost its network; the last checkpoint is intact.
        RuntimeError: one of the started processes failed; its traceback is on standard error.
        KeyboardInterrupt: Ctrl-C; `resume="auto"` continues.
    """
    checked = load_config(config, *overrides)
    if resume not in ("never", "auto"):
        raise UserError(f"resume: {resume!r}: choose 'never' or 'auto'")
    if ranks is None:
        if max_restarts is not None:
            raise UserError(f"max_restarts: {max_restarts}: restarts are of processes that are started here; add ranks=N")
        interrupted = run_here(checked, resume)
    else:
        check_ranks(ranks)
        (interrupted,) = start([(checked, resume)], ranks, max_restarts or 0)
    return Result(Path(checked.output) / checked.name, interrupted)


def run_here(config: Config, resume: str, stop: StopRequest | None = None) -> str | None:
    """Run in this process; the name of the signal that has ended it early, if one did.

    Args:
        stop: listens already, in a process that ends with the run; None: the program's signals are heard meanwhile.
    Raises:
        KeyboardInterrupt: SIGINT was heard here.
    """
    # These import torch: `import fedmoe_ds` must not.
    from fedmoe_ds.api.world import heard_signals, joined

    if stop is not None:
        with joined(config, goes_on=False) as runtime:
            stop.begun()
            return _train(config, resume, stop, runtime)
    with heard_signals() as stop, joined(config) as runtime:
        interrupted = _train(config, resume, stop, runtime)
    if stop.name == "SIGINT":
        folder = Path(config.output) / config.name
        raise KeyboardInterrupt(f"the run in {folder} was asked to stop; resume='auto' continues it")
    return interrupted


def _train(config: Config, resume: str, stop: StopRequest, runtime: Runtime) -> str | None:
    from fedmoe_ds.federation.session import train  # DeepSpeed: after `joined` has chosen the accelerator

    return train(config, runtime, resume, stop).interrupted
