"""Prefork: `launch/train.py` in processes of their own that begin with its imports done, which are most of a refused start.

One server per pytest process imports what a start imports and forks for every request; what it forks runs the script as python
does, from the command line to the exit code. Tests of how a start begins (launchers, signals, imports) start python itself.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import IO, Any


class Server:
    """The process that forks; it ends when its standard input is closed."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, str(Path(__file__))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        atexit.register(self._close)

    def run(self, script: Path, arguments: list[str], here: Path, streams: tuple[Path, Path]) -> int:
        """Run the script in the folder `here`, standard output and error into files; return its exit code."""
        request = {"script": str(script), "arguments": arguments, "here": str(here), "streams": list(map(str, streams))}
        asked, told = self._process.stdin, self._process.stdout
        assert asked is not None and told is not None
        asked.write(json.dumps(request) + "\n")
        asked.flush()
        answer = told.readline()
        assert answer, f"the server ended with {self._process.wait()}"
        return int(answer)

    def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@cache
def server() -> Server:
    """The one of this pytest process, in the environment that all starts get."""
    from launching import environment

    return Server(environment())


def serve(requests: IO[str]) -> None:
    """Answer every request with an exit code."""
    import fedmoe_ds.federation.session  # noqa: F401  (what a start imports before it trains)

    # fork() takes one thread along: a lock of another could stay taken for ever. Arrow's allocator has one that knows forks.
    assert threading.active_count() == 1, threading.enumerate()
    # Not standard output itself: the children write there.
    answers = os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        if (child := os.fork()) == 0:
            become(request)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def become(request: dict[str, Any]) -> None:
    """Be the command, as python starts it."""
    os.setsid()
    os.chdir(request["here"])
    for number, stream in enumerate(request["streams"], 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    # A line at a time: what is read ahead would be the children's as well.
    serve(iter(sys.stdin.readline, ""))  # type: ignore[arg-type]
