"""Kills at random moments that are chosen from a run's observed progress, and the comparison with a run that was left alone.

A topology is written (clusters, ep_size); (1, 1) runs under plain python, everything else under the deepspeed launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from launching import Job, Result, changed, read_events

Topology = tuple[int, int]
PHASES = ("training", "evaluation", "checkpoint")
START = "start"
START_S = 5.0  # CPU time of imports and loading, about
RESUME = ("--resume", "auto")


def several_waves(nano: dict[str, Any]) -> dict[str, Any]:
    """The `nano` federation with one client at a time: four waves in a round, and evaluation of every client every round."""
    return changed(
        nano,
        federation={"rounds": 3},
        local={"steps": 24},
        execution={"clients_in_flight": 1},
        evaluation={"max_sequences": None, "client_sequences": 4, "clients_every": 1},
        checkpoint={"keep": 2},
    )


def start(config: dict[str, Any], folder: Path, topology: Topology, options: tuple[str, ...] = RESUME) -> Job:
    """Start or continue a run on a topology."""
    clusters, ep_size = topology
    ranks = clusters * ep_size
    return Job(changed(config, topology={"ep_size": ep_size}), folder, 0 if ranks == 1 else ranks, options)


class Watch:
    """What one start of a run has done so far; what earlier starts wrote does not count."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._since = time.time()

    def begun(self) -> bool:
        return any(event["event"] in ("run", "resume") for event in self._fresh())

    def rounds(self) -> list[dict[str, Any]]:
        """The rounds that this start has finished."""
        return [event for event in self._fresh() if event["event"] == "round"]

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written right now."""
        return any((self.job.folder / "checkpoints").glob(".writing-*"))

    def work(self, seconds: float) -> bool:
        """Wait until rank 0 has used this much more CPU time: how far it gets does not depend on the machine's load."""
        process = psutil.Process(self.job.ranks()[0])
        with contextlib.suppress(psutil.NoSuchProcess):
            until = process.cpu_times().user + seconds
            return self.job.wait_until(lambda: _used(process) >= until)
        return False

    def _fresh(self) -> list[dict[str, Any]]:
        return [event for event in self.job.events() if event["time"] >= self._since]


def _used(process: psutil.Process) -> float:
    try:
        return process.cpu_times().user
    except psutil.NoSuchProcess:
        return float("inf")


def kill_a_rank(
    job: Job, draw: np.random.Generator, pace: dict[str, float], rounds: int, phases: tuple[str, ...] = PHASES
) -> str | None:
    """SIGKILL a random rank at a random moment; None if the run was over before.

    Args:
        pace: seconds of a round in `train` and `evaluate`, as its `round` event tells.
        rounds: the moment lies within the first so many rounds of this start.
        phases: what the moment may be aimed at.
    Returns:
        The phase that it was aimed at.
    """
    watch = Watch(job)
    phase = phases[int(draw.integers(len(phases)))]
    wanted, place, which = int(draw.integers(rounds)), float(draw.random()), int(draw.integers(8))
    if not job.wait_until(lambda: job.ranks() if phase == START else watch.begun() and len(watch.rounds()) >= wanted):
        return None
    ranks = job.ranks()
    if phase == "checkpoint":  # it takes a few milliseconds
        if not job.wait_until(watch.is_writing, poll_s=0.0002):
            return None
        time.sleep(0.01 * place)
    elif not watch.work(_work_before(phase, place, pace)):
        return None
    try:
        os.kill(ranks[which % len(ranks)], signal.SIGKILL)
    except ProcessLookupError:
        return None
    return phase


def _work_before(phase: str, place: float, pace: dict[str, float]) -> float:
    if phase == START:
        return place * START_S
    return place * pace["train"] if phase == "training" else pace["train"] + place * pace["evaluate"]


def evaluations(folder: Path) -> list[tuple[Any, ...]]:
    """All evaluation rows of a run in the order of writing, without their time."""
    names = ("round", "tier", "split", "client", "perplexity", "accuracy", "loss", "tokens")
    return [tuple(event.get(name) for name in names) for event in read_events(folder, "eval")]


def assert_same(result: Result, undisturbed: Result) -> None:
    """Digest and evaluation figures are those of the run that was left alone, every row exactly once."""
    assert result.digest == undisturbed.digest
    rows = evaluations(result.folder)
    assert len({row[:4] for row in rows}) == len(rows), "a row was written twice"
    assert rows == evaluations(undisturbed.folder)
    rounds = [event["round"] for event in read_events(result.folder, "round")]
    assert rounds == [event["round"] for event in read_events(undisturbed.folder, "round")]
