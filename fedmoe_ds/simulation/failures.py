"""Failures: how often a job fails, and what checkpoints, lost work and restarts cost then.

Any host that fails ends the job; failures come at random, at a rate that does not change (exponential). Sources: J. W. Young, A
first order approximation to the optimum checkpoint interval, CACM 17 (1974); J. T. Daly, A higher order estimate of the optimum
checkpoint interval for restart dumps, FGCS 22 (2006); a test computes the intervals of its figures 3 to 5 again. A checkpoint
that is written in the background counts once it is on disk. Seconds everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Seconds = Any
"""A number, or float64 [n]."""


@dataclass(frozen=True)
class Failures:
    """Failures of a whole job.

    Attributes:
        between: mean seconds between two of them, over all hosts.
        restart: seconds from a failure until training goes on; another failure may fall into them.
    """

    between: float
    restart: float

    @property
    def per_day(self) -> float:
        return 86400.0 / self.between

    def segment(self, work: Seconds, lag: Seconds = 0.0) -> Seconds:
        """Expected seconds until `work` seconds (a checkpoint's own included) are done that begin again at every failure.

        M e^(R / M) (e^(w / M) - 1) (Daly 2006), and a failure within the first `lag` seconds undoes the segment before, too,
        because its checkpoint is not on disk yet: the factor e^(lag / M). Infinite where floats end.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            return self.between * np.exp((self.restart + lag) / self.between) * np.expm1(np.asarray(work) / self.between)

    def completes(self, work: float) -> float:
        """The chance that `work` seconds pass without a failure."""
        return math.exp(-work / self.between)

    def young(self, checkpoint: float) -> float:
        """Best seconds of work between checkpoints that training waits `checkpoint` seconds for, to first order."""
        return math.sqrt(2.0 * checkpoint * self.between)

    def daly(self, checkpoint: float) -> float:
        """The same to higher order."""
        ratio = checkpoint / (2.0 * self.between)
        if ratio >= 1.0:
            return self.between
        return self.young(checkpoint) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - checkpoint


@dataclass(frozen=True)
class Checkpointing:
    """Checkpoints of a run whose rounds all take `round_s`.

    Attributes:
        write_s: seconds until a checkpoint is on disk.
        background: it is written while the next round trains, and that round waits for it at its end.
    """

    round_s: float
    write_s: float
    background: bool

    @property
    def blocking(self) -> float:
        """Seconds that training waits for one checkpoint."""
        return max(0.0, self.write_s - self.round_s) if self.background else self.write_s

    def expected(self, failures: Failures, every: Seconds) -> Seconds:
        """Expected seconds of `every` rounds and their checkpoint."""
        return failures.segment(np.asarray(every) * self.round_s + self.blocking, self.write_s if self.background else 0.0)

    def slowdown(self, failures: Failures, every: Seconds) -> Seconds:
        """Expected seconds over those of rounds alone, without checkpoints and failures."""
        return self.expected(failures, every) / (np.asarray(every) * self.round_s)

    def best(self, failures: Failures, rounds: int) -> int:
        """Rounds between checkpoints with the least expected time; 1 where no number of rounds ends in finite time."""
        every = np.arange(1, min(rounds, 10_000) + 1)
        # The first of equals: less is lost.
        return int(every[np.nanargmin(np.nan_to_num(self.slowdown(failures, every), nan=np.inf))])
