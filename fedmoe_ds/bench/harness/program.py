"""Program: the benchmark's end of a measured system in processes of its own, which answers requests.

One JSON request per line of its standard input is answered with one JSON line on its standard output; `worker.py` has the
other end. A process of its own gives every system its own peak of memory, and lets rounds alternate between systems.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmoe_ds.bench.harness.process import environment, kill_process_tree, module_command, start, tail
from fedmoe_ds.errors import UserError

_WORKER = "fedmoe_ds.bench.harness.worker"


@dataclass(frozen=True)
class Start:
    """A command and the environment variables that it gets beside the usual ones."""

    command: list[str]
    variables: Mapping[str, str] = field(default_factory=dict)


class Program:
    """Processes that write one log and end together; the first one answers requests. The log is shown when it dies."""

    def __init__(self, name: str, starts: list[Start]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the processes)
        self._processes: list[subprocess.Popen[str]] = []
        for one in starts:
            self._processes.append(start(one.command, self._log, environment(one.variables), talk=not self._processes))
        first = self._processes[0]
        assert first.stdin is not None and first.stdout is not None
        self._requests, self._answers = first.stdin, first.stdout

    def send(self, **request: Any) -> None:
        """Send a request without waiting for the answer."""
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> Any:
        """The answer to the oldest open request. Raises UserError where the program found one, RuntimeError where it died."""
        line = self._answers.readline()
        if not line:
            raise self._death()
        reply = json.loads(line)
        if "user_error" in reply:
            raise UserError(reply["user_error"])
        return reply["result"]

    def ask(self, **request: Any) -> Any:
        self.send(**request)
        return self.receive()

    def close(self) -> None:
        """End all processes and everything below them, whatever they are doing."""
        for process in self._processes:
            kill_process_tree(process)
        for pipe in (self._requests, self._answers, self._log):
            with contextlib.suppress(BrokenPipeError):  # an unsent request
                pipe.close()

    def _death(self) -> RuntimeError:
        code = self._processes[0].wait()
        return RuntimeError(f"'{self.name}' ended with exit code {code}:\n{tail(self._log)}")


@contextlib.contextmanager
def programs(starts: Mapping[str, list[Start]]) -> Iterator[dict[str, Program]]:
    """Start the programs by name, and end them all on the way out."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Program] = {}
        for name, processes in starts.items():
            running[name] = Program(name, processes)
            stack.callback(running[name].close)
        yield running


def workers(module: str, names: Iterable[str], device: str = "cpu") -> contextlib.AbstractContextManager[dict[str, Program]]:
    """A program for each of the systems that a module offers with `make_worker(name)`."""
    variables = {"DS_ACCELERATOR": device}
    return programs({name: [Start(module_command(_WORKER, module, name), variables)] for name in names})


def alternate(
    running: Mapping[str, Program], rounds: int, note: Callable[[str], None], label: str = "", **request: Any
) -> dict[str, list[Any]]:
    """Every program's answers to one request, in rounds of all of them: a slow minute of the machine is everybody's."""
    found: dict[str, list[Any]] = {name: [] for name in running}
    for turn in range(rounds):
        note(f"{label}round {turn + 1} of {rounds}")
        for name, program in running.items():
            found[name].append(program.ask(**request))
    return found


def ask_at_once(running: Iterable[Program], **request: Any) -> list[Any]:
    """Answers to a request that all programs work on at the same time."""
    running = list(running)
    for program in running:
        program.send(**request)
    return [program.receive() for program in running]
