"""Steps: what a visit does, in order of value, and `python -m fedmoe_ds.bench.gpu.steps NAME REQUEST FILE`, which does one.

A step is a process of its own: one that breaks the device's context, or fills its memory, takes nothing from those behind it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.gpu.request import CORRECTNESS, PROFILE, QUICKSTART, WAVE, Request, Tell, WrongError
from fedmoe_ds.errors import UserError
from fedmoe_ds.terminal import note

MODULE = "fedmoe_ds.bench.gpu.steps"


@dataclass(frozen=True)
class Step:
    """One step: a function that tells what it finds, and raises where something is wrong.

    Attributes:
        limit_s: seconds that it has at least; what the steps before it leave over comes on top.
        module: of this package, imported by the step alone: minutes of a visit would go into imports.
        function: its name there.
        arguments: what it gets beside the request.
        needs_model: it reads what the step `model` writes.
        writes: what it leaves in the folder of results, beside its log.
    """

    limit_s: float
    module: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs_model: bool = False
    writes: str | None = None

    def run(self, request: Request, tell: Tell) -> None:
        module = importlib.import_module(f"{__package__}.{self.module}")
        getattr(module, self.function)(request, tell, **self.arguments)

    def results(self, request: Request) -> list[Path]:
        """What is there of all that it writes."""
        if self.writes is None:
            return []
        tokens = self.arguments.get("sequences", 0) * request.length
        return sorted(Path(request.output).glob(self.writes.format(tokens=tokens, kernels="*")))


MODEL = "model"
STEPS = {
    "facts": Step(20, "checks", "facts"),
    "correctness": Step(75, "checks", "correctness", writes=CORRECTNESS),
    "quickstart": Step(60, "checks", "quickstart", writes=QUICKSTART),
    "floor": Step(20, "speeds", "floor"),
    "grouped": Step(20, "checks", "grouped"),
    MODEL: Step(45, "speeds", "model"),
    "wave-1": Step(60, "speeds", "wave", {"sequences": 1}, needs_model=True, writes=WAVE),
    "wave-16": Step(75, "speeds", "wave", {"sequences": 16}, needs_model=True, writes=WAVE),
    "memory": Step(45, "speeds", "memory", needs_model=True),
    "profile": Step(40, "speeds", "profile", needs_model=True, writes=PROFILE),
    "nccl": Step(20, "checks", "nccl"),
}
"""In order of value. All limits together are the eight minutes of a visit."""


def main() -> None:
    name, request, file = sys.argv[1:]
    code = 0
    try:
        STEPS[name].run(Request(**json.loads(request)), Tell(Path(file)))
    except (WrongError, UserError) as error:
        note(error)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no atexit handler may wait for a device that is lost


if __name__ == "__main__":
    main()
