"""Planned run: one real job (`launch/train.py` under torchrun) with the peak memory of every rank, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmoe_ds.distributed.launcher import free_port

SCRIPT = Path(__file__).parents[3] / "launch" / "train.py"
_LOOK_S = 0.05
_TAIL = 3000


@dataclass(frozen=True)
class Finished:
    """A job that went well: its events, and peak resident bytes by rank."""

    events: list[dict[str, Any]]
    peak: dict[int, int]

    def rounds(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "round"]


def run_job(tree: dict[str, Any], folder: Path, ranks: int, timeout_s: float = 300.0) -> Finished:
    """Run a configuration to its end. Raises RuntimeError with the end of its output where it fails."""
    config = folder / f"{tree['name']}.yaml"
    config.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, str(SCRIPT), "--config", str(config)]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
        command = [sys.executable, *launcher, *command[1:]]
    log = folder / f"{tree['name']}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=_environment())
        try:
            peak = _watch(process, time.monotonic() + timeout_s)
        finally:
            end_family(process)
    if process.returncode:
        tail = log.read_text(errors="replace")[-_TAIL:]
        raise RuntimeError(f"{tree['name']} on {ranks} ranks ended with exit code {process.returncode}:\n{tail}")
    metrics = Path(tree["output"]) / tree["name"] / "metrics.jsonl"
    return Finished([json.loads(line) for line in metrics.read_text().splitlines()], peak)


def end_family(process: subprocess.Popen[Any]) -> None:
    """End a process that is still there and all below it: torchrun gives its ranks sessions, so no group holds them all."""
    if process.poll() is None:
        for pid in _family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def _watch(process: subprocess.Popen[bytes], until: float) -> dict[int, int]:
    """Peak resident bytes by rank, until the job ends."""
    peak: dict[int, int] = {}
    ranks: dict[int, int] = {}
    while process.poll() is None:
        assert time.monotonic() < until, "a measured job takes too long"
        for pid in _family(process.pid):
            if pid not in ranks and (rank := _rank(pid)) is not None:
                ranks[pid] = rank
        for pid, rank in ranks.items():
            peak[rank] = max(peak.get(rank, 0), _high_water(pid))
        time.sleep(_LOOK_S)
    return peak


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:
        try:
            for thread in (Path("/proc") / str(parent) / "task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
        except OSError:  # it has just ended
            continue
    return found


def _rank(pid: int) -> int | None:
    """The rank of a process that runs the training script; None for launchers and helpers."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
        variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if len(words) < 2 or Path(os.fsdecode(words[1])).name not in (SCRIPT.name, "-u"):
        return None
    places = [int(text[5:]) for text in variables if text.startswith(b"RANK=")]
    return places[0] if places else 0


def _high_water(pid: int) -> int:
    try:
        status = (Path("/proc") / str(pid) / "status").read_text()
    except OSError:
        return 0
    return max((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), default=0)
