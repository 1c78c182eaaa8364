"""Process: how a measurement starts a process, waits for its end, and ends all that is below it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from fedmoe_ds.distributed.launcher import free_port

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
_TAIL = 3000  # of an output, in bytes: enough for a traceback


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, for a process of one thread that no launcher has started; with more variables."""
    # A measurement may itself have been started by a launcher: its children must not join that world.
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHER} | _ONE_THREAD | dict(variables or {})


def torchrun(ranks: int) -> list[str]:
    """What starts a script, or `-m` and a module, on several ranks of this machine; this interpreter alone for one rank."""
    if ranks == 1:
        return [sys.executable]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    return [sys.executable, *launcher]


def module_command(module: str, *arguments: str) -> list[str]:
    """A module of this package under this interpreter."""
    return [sys.executable, "-m", module, *arguments]


@contextlib.contextmanager
def scratch_folder(prefix: str = "fedmoe-bench-", parent: Path | None = None) -> Iterator[Path]:
    """A folder that is gone afterwards, in the usual place for such or in `parent`."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as folder:
        yield Path(folder)


def start(
    command: list[str], log: IO[bytes], env: Mapping[str, str] | None = None, talk: bool = False
) -> subprocess.Popen[str]:
    """Start a command whose output goes to the log; with `talk`, standard input and output are pipes.

    `env` is `environment()` where nothing is given.
    """
    pipe, out = (subprocess.PIPE, subprocess.PIPE) if talk else (subprocess.DEVNULL, log)
    return subprocess.Popen(
        command, stdin=pipe, stdout=out, stderr=log, text=True, env=environment() if env is None else dict(env)
    )


def run_to_end(
    name: str,
    command: list[str],
    timeout_s: float,
    look: Callable[[int], None] | None = None,
    every_s: float = 0.05,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command to its end; meanwhile `look` is called with its process id again and again. `env` is as for `start`.

    Raises:
        RuntimeError: it failed, or takes too long; with the end of its output.
    """
    with tempfile.TemporaryFile() as log:  # no pipe: nobody reads it meanwhile, and a full one would stop the command
        process, until = start(command, log, env), time.monotonic() + timeout_s
        try:
            while process.poll() is None:
                if time.monotonic() > until:
                    raise RuntimeError(f"{name} has not ended after {timeout_s:.0f} s:\n{tail(log)}")
                if look is not None:
                    look(process.pid)
                time.sleep(every_s)
        finally:
            kill_process_tree(process)
        if process.returncode:
            raise RuntimeError(f"{name} ended with exit code {process.returncode}:\n{tail(log)}")


def tail(log: IO[bytes]) -> str:
    """The end of an output."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _TAIL))
    return log.read().decode(errors="replace")


def kill_process_tree(process: subprocess.Popen[str]) -> None:
    """End a process that is still there and all below it: torchrun gives its ranks sessions, so no group holds them all."""
    if process.poll() is None:
        for pid in process_tree(process.pid):  # parents first: a launcher must not take the end of its ranks for a failure
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def process_tree(pid: int) -> list[int]:
    """A process and all below it. Read from /proc: psutil goes through all processes of the machine, which a look at a
    measured job every few milliseconds would be noticed by."""
    found = [pid]
    for parent in found:
        try:
            for thread in (Path("/proc") / str(parent) / "task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
        except OSError:  # it has just ended
            continue
    return found
