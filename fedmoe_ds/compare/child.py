"""Child: one start of the real command for a run of a study.

It runs in a session of its own, so that Ctrl-C at the terminal reaches the study alone. The study asks every rank for a stop
with a checkpoint by SIGUSR1: launchers start with that signal ignored and let the ranks, which listen to it, end in their own
time (to SIGTERM the deepspeed launcher answers by killing them after half a minute).
A child inherits the lock on the study's folder: as long as one lives, nobody else starts the same runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from fedmoe_ds.compare.study import Run
from fedmoe_ds.config import dump_config
from fedmoe_ds.errors import EXIT_USER_ERROR
from fedmoe_ds.launcher import free_port

# A study started under a launcher would otherwise pass its own rank on to every run.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Child:
    """A running command.

    Args:
        script: launch/train.py.
        ranks: 1 is plain python, more the deepspeed launcher.
        environment: of the study; OMP_NUM_THREADS is the run's `execution.threads` unless set there.
        lock: file descriptor to inherit.
    """

    def __init__(self, run: Run, script: Path, ranks: int, environment: Mapping[str, str], lock: int) -> None:
        self.run = run
        self.log = Path(f"{run.folder}.log")
        config = Path(f"{run.folder}.yaml")
        config.write_text(dump_config(run.config), encoding="utf-8")
        kept = {name: value for name, value in environment.items() if name not in _LAUNCHER}
        kept.setdefault("OMP_NUM_THREADS", str(run.config.execution.threads))
        command = [*_launcher(ranks), str(script), "--config", str(config), "--resume", "auto"]
        self._began = time.monotonic()
        with self.log.open("ab") as log:
            self._start = log.tell()
            before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited; a rank's own handler replaces it
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

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.poll()

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._began

    def stop(self) -> None:
        """Ask every rank to save and end. To be repeated until it has: a rank that is still importing ignores it."""
        self._signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End all of its processes now; what the last checkpoint holds is kept."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def reason(self) -> str:
        """Why it failed: the last line of this start that is marked as the error, else its last line."""
        with self.log.open("rb") as log:
            log.seek(self._start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        marked = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        last = (marked or lines or ["it said nothing"])[-1]
        code = self.poll()
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 and not marked else last

    @property
    def is_user_error(self) -> bool:
        return self.poll() == EXIT_USER_ERROR


def _launcher(ranks: int) -> list[str]:
    if ranks == 1:
        return [sys.executable]
    options = ["--num_accelerators", str(ranks), "--master_port", str(free_port()), "--log_level", "error"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options]
