"""Process: the benchmark's end of a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedmoe_ds.errors import UserError

_VARIABLES = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TAIL = 3000


class Worker:
    """A child process that answers requests. Its output is kept, and shown when it dies."""

    def __init__(self, role: str, variables: Mapping[str, str] | None = None) -> None:
        self.role = role
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedmoe_ds.bench.harness.worker", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**inherited, **_VARIABLES, **(variables or {})},
        )

    def send(self, **request: Any) -> None:
        """Send a request without waiting for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> Any:
        """The answer to the oldest open request. Raises UserError where the worker found one, RuntimeError where it died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
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
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                with _ignore_broken_pipe():
                    pipe.close()

    def _death(self) -> RuntimeError:
        code = self._process.wait()
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL))
        tail = self._log.read().decode(errors="replace")
        return RuntimeError(f"benchmark worker '{self.role}' ended with exit code {code}:\n{tail}")


@contextmanager
def _ignore_broken_pipe() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        return


@contextmanager
def workers(roles: list[str], device: str = "cpu") -> Iterator[dict[str, Worker]]:
    """Start one worker per role, and end them all on the way out."""
    started: dict[str, Worker] = {}
    try:
        for role in roles:
            started[role] = Worker(role, {"DS_ACCELERATOR": device})
        yield started
    finally:
        for worker in started.values():
            worker.close()
