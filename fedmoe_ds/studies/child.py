"""Child: one start of the real command for a run of a study: ranks of this machine, or of a SLURM allocation.

It runs in a session of its own, so that Ctrl-C at the terminal reaches the study alone, and inherits a lock of the study: as
long as it lives, nobody else starts the same run. A stop with a checkpoint is asked for by SIGUSR1: here of all its processes
(the deepspeed launcher, which answers SIGTERM by killing the ranks after half a minute, is started with that signal ignored and
lets them end in their own time), under SLURM of srun alone, which passes it on to the ranks on all nodes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmoe_ds.config import dump_config
from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import open_plain, write_whole
from fedmoe_ds.studies.gpus import VISIBLE, launcher_options
from fedmoe_ds.studies.resources import step_options
from fedmoe_ds.studies.run import Run

# A study started under a launcher would otherwise pass its own rank on to every run.
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
_LAUNCHER_SAYS = "] [launch.py:"  # DeepSpeed's own log: which command ended with which code


class Child:
    """A running command.

    Args:
        script: what trains a run.
        environment: of the study; OMP_NUM_THREADS is the run's `execution.threads` unless set there.
        lock: file descriptor to inherit.
        by_slurm: start the ranks with srun, inside of an allocation.
        slot: its place among the runs that are at work at once.
        gpus: one for each rank, under names of $CUDA_VISIBLE_DEVICES; where there are none the ranks take what they find.
    Raises:
        UserError: the configuration or the messages beside the run folder cannot be written.
    """

    def __init__(
        self,
        run: Run,
        script: Path,
        environment: Mapping[str, str],
        lock: int,
        by_slurm: bool = False,
        slot: int = 0,
        gpus: Sequence[str] = (),
    ) -> None:
        self.run, self.slot, self.log = run, slot, Path(f"{run.folder}.log")
        config = Path(f"{run.folder}.yaml")
        try:
            write_whole(config, dump_config(run.config))
            handle = open_plain(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise UserError(f"--output: {run.folder}.yaml, .log: cannot be written: {error.strerror or error}") from None
        self._by_slurm = by_slurm
        # Under SLURM the site may have chosen where ranks meet. Tasks per node are said by `step_options`.
        dropped = (*_RANK, "SLURM_NTASKS_PER_NODE") if by_slurm else (*_RANK, "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in environment.items() if name not in dropped}
        kept.setdefault("OMP_NUM_THREADS", str(run.config.execution.threads))
        if gpus:
            kept[VISIBLE] = ",".join(gpus)
        command = [*self._launcher(run.ranks, gpus, environment), str(script), "--config", str(config), "--resume", "auto"]
        self._began = time.monotonic()
        with open(handle, "ab") as log:
            # The log of a run goes on over its starts; a failure is explained by the lines of this one.
            self._start = log.tell()
            before = signal.signal(signal.SIGUSR1, signal.SIG_DFL if by_slurm else signal.SIG_IGN)
            try:
                self._process = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    env=kept,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
            finally:
                signal.signal(signal.SIGUSR1, before)

    def _launcher(self, ranks: int, gpus: Sequence[str], environment: Mapping[str, str]) -> list[str]:
        if self._by_slurm:
            return ["srun", *step_options(ranks, environment), sys.executable]
        if ranks == 1:
            return [sys.executable]
        options = [*launcher_options(ranks, gpus), "--master_port", str(free_port()), "--log_level", "error"]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *options]

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._began

    def stop(self) -> None:
        """Ask every rank to save and end. To be repeated until it has: a rank that is still importing ignores it."""
        with contextlib.suppress(ProcessLookupError):
            (os.kill if self._by_slurm else os.killpg)(self._process.pid, signal.SIGUSR1)

    def kill(self) -> None:
        """End all of it now; what the last checkpoint holds is kept. (srun takes its ranks with it on SIGTERM only.)"""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM if self._by_slurm else signal.SIGKILL)

    def reason(self) -> str:
        """Why it failed: the last line of this start that is marked as the error, else its last line but the launcher's."""
        with self.log.open("rb") as log:
            log.seek(self._start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if _LAUNCHER_SAYS not in line]
        marked = [line.partition("error: ")[2] for line in lines if line.startswith("error: ")]
        code = self.poll()
        # A rank that gave its reason before it was killed said more than the signal does.
        if code is not None and code < 0 and not marked:
            return f"killed by {signal.Signals(-code).name}"
        return (marked or lines or ["it said nothing"])[-1]
