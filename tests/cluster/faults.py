"""Faults that are drawn from a seed and done to real runs: what, to which rank, when, and how many ranks start next.

A chain is one federation that is started again and again; every start has one fault, and the last start finishes the run. Ranks
are started directly, one per host, without a launcher that would end a job whose watchdog sleeps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from launching import read_events

from fedmoe_ds.checkpoint import reader as checkpoint

HARD = ("kill",) * 8 + ("stop",) * 5 + ("link",) * 5 + ("disk",) * 5
"""Faults that end a start, over all chains."""
SOFT = ("clock", "damage")
"""Faults that a start survives: it goes on to the end, or is asked to stop."""
RANKS = {"kill": (1, 2, 2, 3), "stop": (2, 2, 3), "link": (2, 2, 3), "disk": (1, 2), "clock": (2, 2, 3), "damage": (1, 2)}
PHASES = ("training", "training", "evaluation", "checkpoint")
LATE_S = 20

# The kernel's namespaces do not cover the time of day, so the late rank asks this library instead of libc.
_LATE_CLOCK = """\
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(id, t);
    if (!result && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec -= LATE_S;
    return result;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


@dataclass(frozen=True)
class Fault:
    """One start and what is done to it.

    Attributes:
        ranks, ep_size: the world of this start.
        rank: whom it hits.
        after: rounds that this start may finish before.
        phase, place: where in the round (`killing.PHASES`), and how far into it (0 to 1).
        last: the start goes on to the end of the run.
    """

    kind: str
    ranks: int
    ep_size: int
    rank: int
    after: int
    phase: str
    place: float
    last: bool

    def __str__(self) -> str:
        when = "to the end" if self.last else f"{self.phase} {self.place:.2f} after {self.after} rounds"
        return f"{self.kind} of rank {self.rank} of {self.ranks} (ep_size {self.ep_size}), {when}"


def draw_chains(seed: int, chains: int) -> list[list[Fault]]:
    """All faults of a campaign: the hard ones and two soft ones shuffled over the chains, and a soft one at the end of each."""
    draw = np.random.default_rng(seed)
    kinds = [str(kind) for kind in draw.permutation([*HARD, *SOFT])]
    assert len(kinds) % chains == 0
    length = len(kinds) // chains
    result = []
    for chain in range(chains):
        deck = kinds[chain * length : (chain + 1) * length]
        deck.sort(key=lambda kind: kind == "damage")  # there is something to damage only later
        ends = SOFT[chain % len(SOFT)]
        first, *others = [_draw_fault(draw, kind, False) for kind in deck]
        # Whatever the others leave, round 1 is saved then: it is on disk before round 2 is added up.
        result.append([replace(first, after=2), *others, _draw_fault(draw, ends, True)])
    return result


def _draw_fault(draw: np.random.Generator, kind: str, last: bool) -> Fault:
    ranks = int(draw.choice(RANKS[kind]))
    ep_size = int(draw.choice([1, ranks])) if ranks < 3 else 1
    # Only ranks that write can meet a full disk: rank 0, and the others of cluster 0.
    rank = int(draw.integers(ep_size if kind == "disk" else ranks))
    return Fault(kind, ranks, ep_size, rank, int(draw.integers(2)), str(draw.choice(PHASES)), float(draw.random()), last)


def compile_late_clock(folder: Path) -> Path:
    """The library that makes a process LATE_S late, checked on a process of its own."""
    source, library = folder / "late_clock.c", folder / "late_clock.so"
    source.write_text(_LATE_CLOCK)
    options = ["-shared", "-fPIC", "-O1", f"-DLATE_S={LATE_S}"]
    subprocess.run(["cc", *options, str(source), "-o", str(library), "-ldl"], check=True)
    ask = [sys.executable, "-c", "import time; print(time.time())"]
    told = subprocess.run(ask, env=os.environ | {"LD_PRELOAD": str(library)}, capture_output=True, text=True, check=True)
    assert LATE_S - 5 < time.time() - float(told.stdout) < LATE_S + 5, "the late clock is not late"
    return library


def newest_round(run: Path) -> int:
    """Rounds in the newest checkpoint; 0 without any."""
    found = checkpoint.candidates(run / "checkpoints") if (run / "checkpoints").exists() else []
    return int(found[0].name.split("-")[1]) if found else 0


def damage_newest(run: Path, draw: np.random.Generator) -> str:
    """Flip bytes in the middle of a file of the newest checkpoint; its name."""
    newest = checkpoint.candidates(run / "checkpoints")[0]
    files = sorted(path for path in newest.iterdir() if path.stat().st_size > 8)
    file = files[int(draw.integers(len(files)))]
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = bytes(255 - value for value in content[middle : middle + 4])
    file.write_bytes(content)
    return newest.name


def finished_rounds(run: Path) -> dict[int, dict[str, Any]]:
    """The rows of finished rounds; their times and seconds tell whether a round was trained once or again."""
    rows = read_events(run, "round")
    assert len({row["round"] for row in rows}) == len(rows), "a round was written twice"
    return {row["round"]: row for row in rows}
