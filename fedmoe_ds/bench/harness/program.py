"""Program: a measured system that is a command of its own: another interpreter, or several ranks. Both ends of its talk.

As with a worker, one JSON request per line is answered with one JSON line. Flower's environment imports this file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from fedmoe_ds.bench.harness.process import Worker

_VARIABLES = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Start:
    """A command and the environment variables that it gets beside the usual ones."""

    command: list[str]
    variables: Mapping[str, str] = field(default_factory=dict)


class Program(Worker):
    """Processes that write one log and end together; the first one answers requests."""

    def __init__(self, role: str, starts: list[Start]) -> None:
        self.role = role
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the processes)
        self._others: list[subprocess.Popen[str]] = []
        self._process = self._started(starts[0], subprocess.PIPE)
        for start in starts[1:]:
            self._others.append(self._started(start, subprocess.DEVNULL))

    def _started(self, start: Start, pipe: int) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        variables = {**inherited, **_VARIABLES, **start.variables}
        return subprocess.Popen(start.command, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=variables)

    def close(self) -> None:
        """End all processes and everything below them, whatever they are doing."""
        from fedmoe_ds.bench.harness.jobs import end_family  # needs more than Flower's environment has

        for process in (self._process, *self._others):
            end_family(process)
        super().close()


@contextmanager
def programs(starts: Mapping[str, list[Start]]) -> Iterator[dict[str, Program]]:
    """Start the programs by name, and end them all on the way out."""
    with ExitStack() as stack:
        running: dict[str, Program] = {}
        for name, processes in starts.items():
            running[name] = Program(name, processes)
            stack.callback(running[name].close)
        yield running


def module_command(module: str, *arguments: str) -> list[str]:
    """A module of this package under this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def take_channel() -> TextIO:
    """The program's end: what was standard output. Whatever libraries print goes to standard error from now on."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return channel


Request = dict[str, Any]
