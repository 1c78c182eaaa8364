"""Jobs: real runs of launch/train.py under torchrun, with the peak memory of every rank, watched from outside."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from fedmoe_ds.bench.harness.process import process_tree, run_to_end, torchrun

SCRIPT = Path(__file__).parents[2] / "commands" / "train.py"


@dataclass(frozen=True)
class Finished:
    """A job that went well: its events, and peak resident bytes by rank."""

    events: list[dict[str, Any]]
    peak: dict[int, int]

    def rounds(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "round"]


def metrics_file(tree: dict[str, Any]) -> Path:
    """Where a run of this configuration tells what happens."""
    return Path(tree["output"], tree["name"], "metrics.jsonl")


def run_job(
    tree: dict[str, Any],
    folder: Path,
    ranks: int,
    timeout_s: float = 300.0,
    look: Callable[[int], None] | None = None,
    every_s: float = 0.05,
    more: Sequence[str] = (),
) -> Finished:
    """Run a configuration to its end, with `more` arguments; meanwhile `look` is called with the first process's id as well.

    Raises:
        RuntimeError: the run failed, or takes too long; with the end of its output.
    """
    config = folder / f"{tree['name']}.yaml"
    config.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    watch = _PeakWatch()

    def both(pid: int) -> None:
        watch.look(pid)
        if look is not None:
            look(pid)

    command = [*torchrun(ranks), str(SCRIPT), "--config", str(config), *more]
    run_to_end(f"{tree['name']} on {ranks} ranks", command, timeout_s, both, every_s)
    return Finished([json.loads(line) for line in metrics_file(tree).read_text().splitlines()], watch.peak)


class _PeakWatch:
    """Peak resident bytes by rank of the processes below one."""

    def __init__(self) -> None:
        self.peak: dict[int, int] = {}
        self._ranks: dict[int, int] = {}

    def look(self, pid: int) -> None:
        for one in process_tree(pid):
            if one not in self._ranks and (rank := _rank(one)) is not None:
                self._ranks[one] = rank
        for one, rank in self._ranks.items():
            self.peak[rank] = max(self.peak.get(rank, 0), high_water(one))


def _rank(pid: int) -> int | None:
    """The rank of a process that runs the training script; None for launchers and helpers."""
    try:
        process = psutil.Process(pid)
        words, variables = process.cmdline(), process.environ()
    except (psutil.Error, OSError):
        return None
    # torchrun starts a rank as `python -u SCRIPT`; whoever has no RANK is the only one.
    if len(words) < 2 or Path(words[1]).name not in (SCRIPT.name, "-u"):
        return None
    return int(variables.get("RANK", 0))


def high_water(pid: int) -> int:
    """Peak resident bytes of a process: the system's own mark, which no peak escapes between two looks. psutil has none."""
    try:
        status = (Path("/proc") / str(pid) / "status").read_text()
    except OSError:
        return 0
    return max((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), default=0)
