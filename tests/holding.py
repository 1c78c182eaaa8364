"""`launch/train.py` whose rank 0 tells when a moment begins, and does not leave it before it is told to.

    python holding.py FOLDER MOMENT ROUNDS [arguments of launch/train.py]

How long a moment lasts depends on the machine and on what else runs there, so whoever wants to strike in it could miss it.
Rank 0 writes `FOLDER/begun` as the moment begins and `FOLDER/held` at its end, and goes on once `FOLDER/free` is there.
`ROUNDS` is how many rounds of this start come before that one.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "launch" / "train.py"
PHASES = {"start": ("start", "load"), "training": ("train",), "evaluation": ("evaluate",)}
"""Moments by phases of `activity`. Another one is `checkpoint`: from the making of its folder until that gets its name."""
LONGEST_S = 120.0
"""So long after the end of a moment nobody is left who would say `free`."""


class Hold:
    """One moment of this process, after so many others of its kind; every other one is none of its business."""

    def __init__(self, folder: Path, moment: str, before: int) -> None:
        self.folder, self.moment, self.before = folder, moment, before

    def begin(self, moment: str) -> None:
        """A moment begins."""
        if moment == self.moment:
            if self.before == 0 or moment == "start":
                (self.folder / "begun").touch()
            self.before -= 1

    def end(self, moment: str) -> None:
        """A moment is over as soon as this returns."""
        if moment != self.moment or not (self.folder / "begun").exists():
            return
        (self.folder / "held").touch()
        deadline = time.monotonic() + LONGEST_S
        while not (self.folder / "free").exists():
            assert time.monotonic() < deadline, "nobody has said `free`: what was to be done here would be done somewhere else"
            time.sleep(0.005)


def listen(hold: Hold) -> None:
    """Hear of all moments of this process."""
    hold.begin("start")  # the imports below are the longest part of it
    from fedmoe_ds.distributed.activity import Activity

    enter = Activity.enter

    def hear(activity: Activity, phase: str, round_index: int | None = None) -> None:
        before = activity.phase
        for moment in (moment for moment, phases in PHASES.items() if before in phases and phase not in phases):
            hold.end(moment)
        enter(activity, phase, round_index)
        for moment in (moment for moment, phases in PHASES.items() if phase in phases and before not in phases):
            if activity.round > 0:  # that of the foundation belongs to no round
                hold.begin(moment)

    def write(event: str, values: tuple[Any, ...]) -> None:
        if event in ("os.mkdir", "os.rename") and Path(os.fsdecode(values[0])).name.startswith(".writing-round-"):
            (hold.begin if event == "os.mkdir" else hold.end)("checkpoint")

    Activity.enter = hear  # type: ignore[method-assign]
    sys.addaudithook(write)


if __name__ == "__main__":
    first, *words = sys.argv[1:]
    launchers = [first] if first.startswith("--local_rank") else []  # deepspeed puts it in front
    folder, moment, rounds, *options = words if launchers else [first, *words]
    if os.environ.get("RANK", "0") == "0":
        listen(Hold(Path(folder), moment, int(rounds)))
    sys.path[0] = str(SCRIPT.parent)
    sys.argv = [str(SCRIPT), *launchers, *options]
    runpy.run_path(sys.argv[0], run_name="__main__")
