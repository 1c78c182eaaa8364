"""Interrupt: Ctrl-C is one line, whatever phase it hits; a run that has begun saves and ends with exit code 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import REPOSITORY, Job, changed

from fedmoe_ds.checkpoint import reader as checkpoint
from fedmoe_ds.distributed.activity import activity
from fedmoe_ds.distributed.launcher import free_port
from fedmoe_ds.distributed.stop_request import StopRequest
from fedmoe_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED

pytestmark = pytest.mark.timeout(300)

SCRIPTS = {
    "train": (("--config", "none.yaml"), EXIT_STOPPED),
    "compare": (("--methods", "flame"), EXIT_INTERRUPTED),
    "scaling": (("--config", "none.yaml"), EXIT_INTERRUPTED),
    "bench": (("wave",), EXIT_INTERRUPTED),
    "plan": (("--config", "none.yaml"), EXIT_INTERRUPTED),
    "submit": (("--config", "none.yaml"), EXIT_INTERRUPTED),
}


@pytest.mark.parametrize(
    ("script", "number"),
    [*((script, signal.SIGINT) for script in SCRIPTS), ("train", signal.SIGTERM), ("train", signal.SIGUSR1)],
)
def test_during_the_imports(script: str, number: signal.Signals, tmp_path: Path) -> None:
    """The process is stopped where it loads torch, and hears the signal there."""
    options, code = SCRIPTS[script]
    command = [sys.executable, str(REPOSITORY / "launch" / f"{script}.py"), *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch_cpu" not in maps.read_text():
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (code, ""), err
    (line,) = err.splitlines()
    assert f"stopped by {number.name}" in line


@pytest.mark.parametrize(
    ("phase", "when"), [("start", "after the step that is running"), ("load", "after the step"), ("train", "after the wave")]
)
def test_ctrl_c_says_once_when_it_is_served(
    phase: str, when: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(activity, "phase", phase)
    stop = StopRequest()
    for _ in range(2):
        stop.receive(signal.SIGINT, None)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"SIGINT: the run ends {when}") and stop.requested


@pytest.mark.cluster
def test_while_the_others_do_not_come(tmp_path: Path) -> None:
    """The main thread waits in C++ for a rank that nobody starts."""
    port = free_port()
    (tmp_path / "config.yaml").write_text("name: alone\n")
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--config", "config.yaml"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | world, stderr=subprocess.PIPE, text=True) as process:
        sockets = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
        while process.poll() is None and not any(f":{port:04X} " in path.read_text() for path in sockets):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED and "stopped by SIGINT before anything was begun" in err, err
    assert "Traceback" not in err


@pytest.mark.cluster
@pytest.mark.parametrize("ranks", [0, 2])
def test_in_the_middle_of_a_run(ranks: int, nano: dict[str, Any], tmp_path: Path) -> None:
    """As a terminal does it: every process of the job gets SIGINT, the deepspeed launcher included."""
    config = changed(
        nano,
        output=str(tmp_path),
        federation={"rounds": 200},
        execution={"clients_in_flight": 1},
        topology={"ep_size": max(ranks, 1)},
    )
    with Job(config, tmp_path, ranks) as job:
        assert job.wait_until(lambda: job.events("round"))
        # Our own child is left to `finish`: whoever waits for it first takes its exit code away.
        below = [process for process in job.processes() if process.ppid() != os.getpid()]
        for process in job.processes():
            process.send_signal(signal.SIGINT)
        psutil.wait_procs(below, timeout=120)
        result = job.finish()
    # The deepspeed launcher lets its own KeyboardInterrupt out; no rank does.
    ours = ('launch/train.py", line', f"{REPOSITORY / 'fedmoe_ds'}")
    assert not any(text in result.stderr for text in ours) and (ranks > 0 or "Traceback" not in result.stderr), result.stderr
    # The launcher answers with SIGTERM, which may be the first that a rank hears.
    assert ranks > 0 or result.stderr.count("SIGINT: the run ends after the wave that is running") == 1
    assert ranks > 0 or result.code == EXIT_STOPPED  # the launcher's own exit code is its affair
    found = checkpoint.candidates(result.folder / "checkpoints")[0]
    assert checkpoint.find_damage(found) is None
    assert "stopped by SIG" in result.stdout and "with a checkpoint" in result.stdout
