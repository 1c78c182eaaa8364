"""The real command for tests: `launch/train.py` under plain python or the deepspeed launcher, watched from outside.

with Job(config, tmp_path, ranks=2) as job:
    job.wait_until(lambda: job.events("round"))
    os.kill(job.ranks()[1], signal.SIGKILL)
    result = job.finish()
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from prefork import server

from fedmoe_ds.errors import EXIT_STOPPED

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "launch" / "train.py"
TIMEOUT_S = 200.0
# What a launcher above pytest may have left in the environment.
_LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMI", "TORCHELASTIC_")
_LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "MASTER_ADDR", "MASTER_PORT", "FEDMOE_CACHE")
_MARK = "FEDMOE_TEST_JOB"


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str
    folder: Path

    @property
    def digest(self) -> str:
        """The digest from the last lines of standard output."""
        expected = EXIT_STOPPED if "stopped by" in self.stdout else 0
        assert self.code == expected, f"exit code {self.code}\n{self.stdout}\n{self.stderr}"
        # The deepspeed launcher adds a line of its own about every exit code but 0.
        lines = [line for line in self.stdout.splitlines() if "[launch.py:" not in line]
        digest, run = lines[-2:]
        assert digest.startswith("digest: ") and run == f"run: {self.folder}", self.stdout
        return digest.removeprefix("digest: ")

    @property
    def errors(self) -> list[str]:
        """The lines on standard error that a user is meant to read as the reason."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    def mistake(self) -> str:
        """The one line about a user's mistake, after checking that it is all there is."""
        text = f"exit code {self.code}\n{self.stdout}\n{self.stderr}"
        assert self.code == 2, text
        assert len(self.errors) == 1, text
        assert "Traceback" not in self.stderr + self.stdout, text
        return self.errors[0]


class Job:
    """One running command with all of its processes; leaving the block ends whatever is left of it.

    Args:
        config: the whole configuration as a tree; written to `folder`.
        folder: where configuration and output streams of this job go.
        ranks: 0 is plain python, anything else the deepspeed launcher.
        options: further command line, after the configuration.
        prepare: called in the new process before it becomes the command.
        script: what python runs, with arguments of its own in front of launch/train.py's.
    Attributes:
        here: the folder of this job, in which its processes are.
    """

    def __init__(
        self,
        config: dict[str, Any] | Path,
        folder: Path,
        ranks: int = 0,
        options: tuple[str, ...] = (),
        prepare: Callable[[], None] | None = None,
        script: tuple[str, ...] = (str(SCRIPT),),
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.here = here = folder / f"job-{self.mark[:8]}"
        here.mkdir(parents=True)
        path = config if isinstance(config, Path) else here / "config.yaml"
        tree: dict[str, Any] = {} if isinstance(config, Path) else config
        if not isinstance(config, Path):
            path.write_text(json.dumps(config))  # YAML is a superset
        self.folder = Path(tree.get("output", "runs")) / tree.get("name", "run")
        self._streams = (here / "stdout", here / "stderr")
        self._port = _free_port()
        command = [*_launcher(ranks, self._port), *script, "--config", str(path), *options]
        with self._streams[0].open("wb") as out, self._streams[1].open("wb") as err:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=err,
                cwd=here,
                env=environment() | {_MARK: self.mark},
                start_new_session=True,
                preexec_fn=prepare,
            )
        self._launched = ranks > 0

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end_all()

    def processes(self) -> list[psutil.Process]:
        """All living processes of this job, launcher included, whatever became of their parents."""
        return [process for process in psutil.process_iter() if _environment_of(process).get(_MARK) == self.mark]

    def ranks(self) -> list[int]:
        """Process ids of the living ranks, in rank order."""
        if not self._launched:
            return [self._process.pid] if self._process.poll() is None else []
        ranks = {}
        for process in self.processes():
            variables = _environment_of(process)
            if "RANK" in variables:
                ranks[int(variables["RANK"])] = process.pid
        return [pid for _, pid in sorted(ranks.items())]

    def running(self) -> bool:
        return self._process.poll() is None

    def signal_ranks(self, number: signal.Signals) -> None:
        """Send a signal to every rank, not to the launcher."""
        for pid in self.ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The complete lines of metrics.jsonl so far."""
        return read_events(self.folder, kind)

    def said(self) -> str:
        """Standard error so far."""
        return self._text(1)

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S, poll_s: float = 0.01) -> bool:
        """Whether the condition came true while the command was running."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.running():
                return False
            assert time.monotonic() < deadline, f"nothing happened in {timeout_s} s\n{self._text(1)}"
            time.sleep(poll_s)
        return True

    def finish(self, timeout_s: float = TIMEOUT_S) -> Result:
        """Wait for the command and check that nothing of it outlives it: no process, no shared memory."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._end_all()
            raise AssertionError(f"still running after {timeout_s} s\n{self._text(0)}\n{self._text(1)}") from None
        result = Result(code, self._text(0), self._text(1), self.folder)
        leftovers = self._end_all(grace_s=5.0)
        assert not leftovers, f"outlived the command: {leftovers}\n{result.stdout}\n{result.stderr}"
        shm = Path("/dev/shm")  # noqa: S108  (looked at, not written)
        shared = [path.name for path in shm.glob(f"*_{self._port}_*")] if self._launched else []
        assert not shared, f"left in shared memory: {shared}"
        return result

    def _text(self, stream: int) -> str:
        return self._streams[stream].read_text(errors="replace")

    def _end_all(self, grace_s: float = 0.0) -> list[str]:
        """Kill what is still there after the grace, and name it."""
        deadline = time.monotonic() + grace_s
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        names = []
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(f"{process.pid} {' '.join(process.cmdline())}")
                process.kill()
        self._process.wait()
        return names


def run(
    config: dict[str, Any] | Path,
    folder: Path,
    ranks: int = 0,
    options: tuple[str, ...] = (),
    prepare: Callable[[], None] | None = None,
) -> Result:
    """Run a command to its end."""
    with Job(config, folder, ranks, options, prepare) as job:
        return job.finish()


def refused(config: dict[str, Any], folder: Path, options: tuple[str, ...] = ()) -> str:
    """The one line about a mistake that one process finds before it trains; see `prefork` for how it is started."""
    here = folder / f"refused-{uuid.uuid4().hex[:8]}"
    here.mkdir(parents=True)
    (here / "config.yaml").write_text(json.dumps(config))
    streams = (here / "stdout", here / "stderr")
    code = server().run(SCRIPT, ["--config", str(here / "config.yaml"), *options], here, streams)
    out, err = (stream.read_text(errors="replace") for stream in streams)
    return Result(code, out, err, Path(config.get("output", "runs")) / config.get("name", "run")).mistake()


def read_events(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The complete events of a run folder, or those of one kind."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    content = path.read_bytes()
    events = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    return [event for event in events if kind is None or event["event"] == kind]


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A configuration with some keys replaced; sections are merged, everything else is overwritten."""
    result = dict(config)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = changed(old, **value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _launcher(ranks: int, port: int) -> list[str]:
    if ranks == 0:
        return [sys.executable]
    script = Path(sys.executable).parent / "deepspeed"
    return [str(script), "--num_accelerators", str(ranks), "--master_port", str(port), "--log_level", "error"]


def environment() -> dict[str, str]:
    """What a command of a test finds: nothing of a launcher above pytest, and the CPU."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return kept | {"PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return {}
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return {}
