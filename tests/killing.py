"""Kills at random moments in which the run waits for them, and the comparison with a run that was left alone.

A topology is written (clusters, ep_size); (1, 1) runs under plain python, everything else under the deepspeed launcher.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from launching import SCRIPT, Job, Result, changed, read_events

Topology = tuple[int, int]
HOLDING = Path(__file__).with_name("holding.py")
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


@dataclass(frozen=True)
class Aim:
    """A moment of one start at which something is done to it.

    Attributes:
        phase: START, or one of PHASES.
        rounds: this start finishes so many before.
        place: how far into the phase, 0 to 1, at the pace of another run; if this one is faster, at the end of the phase.
    """

    phase: str
    rounds: int
    place: float


def draw_aim(draw: np.random.Generator, rounds: int, phases: tuple[str, ...] = PHASES) -> Aim:
    """A random moment within the first so many rounds of a start."""
    phase = phases[int(draw.integers(len(phases)))]
    return Aim(phase, int(draw.integers(rounds)), float(draw.random()))


def program(aim: Aim, folder: Path | str) -> tuple[str, ...]:
    """The command of ranks that wait for what is done to them (`holding.py`), before the arguments of launch/train.py."""
    return (str(HOLDING), str(folder), aim.phase, str(aim.rounds))


def start(
    config: dict[str, Any], folder: Path, topology: Topology, options: tuple[str, ...] = RESUME, aim: Aim | None = None
) -> Job:
    """Start or continue a run on a topology, with a moment that it waits in if it has an aim."""
    clusters, ep_size = topology
    ranks = clusters * ep_size
    config = changed(config, topology={"ep_size": ep_size})
    script = (str(SCRIPT),) if aim is None else program(aim, ".")
    return Job(config, folder, 0 if ranks == 1 else ranks, options, script=script)


def reach(job: Job, aim: Aim, pace: dict[str, float]) -> bool:
    """Wait for the moment that a job was started with; whether it came to that. Rank 0 stays in it until `go_on`.

    Args:
        pace: seconds of a round in `train` and `evaluate`, as its `round` event tells.
    """
    if not job.wait_until((job.here / "begun").exists, poll_s=0.001):
        return False
    held = job.here / "held"
    if aim.phase == "checkpoint":  # it takes a few milliseconds
        time.sleep(0.01 * aim.place)
        return True
    # CPU time: how far it gets does not depend on the machine's load.
    rank = psutil.Process(job.ranks()[0])
    until = rank.cpu_times().user + seconds_into(aim, pace)
    return job.wait_until(lambda: held.exists() or rank.cpu_times().user >= until)


def seconds_into(aim: Aim, pace: dict[str, float]) -> float:
    """From the beginning of the phase."""
    return aim.place * {START: START_S, "training": pace["train"], "evaluation": pace["evaluate"]}[aim.phase]


def go_on(job: Job) -> None:
    """Whatever was to be done is done."""
    (job.here / "free").touch()


def kill_a_rank(job: Job, aim: Aim, pace: dict[str, float], which: int) -> bool:
    """SIGKILL a rank at the moment that the job was started with; whether it came to that before the run was over."""
    if not reach(job, aim, pace):
        return False
    ranks = job.ranks()
    os.kill(ranks[which % len(ranks)], signal.SIGKILL)
    go_on(job)
    return True


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
