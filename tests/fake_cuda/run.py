"""Run cases on the stand-in: `python run.py TOPIC ...` or `TOPIC::CASE`; every case of every topic where none is named.

A topic is a module of cases/, a case one of its functions `case_<what>(fake)`: plain asserts. One process runs all of them, and
prints one JSON line for each: topic, case, ok, error, CPU seconds, counts. Under RANK and WORLD_SIZE it is one rank of several.
Where a module's `NAMES` has names for a function, it is one case for each, `case_<what>[<name>]`, and gets the name, too.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
_LINES = 8
"""Innermost lines of a traceback that are told."""


def main(wanted: list[str]) -> None:
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]  # `distributed` is another module there
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without peers DeepSpeed has nothing to do
    warnings.filterwarnings("ignore")
    import fake_cuda

    fake = fake_cuda.enable(int(os.environ.get("FAKE_DEVICES", "1")))
    import torch

    torch.set_num_threads(1)
    for topic, names in _chosen(wanted).items():
        for name, case in _cases(topic).items():
            if not names or name in names:
                print(json.dumps({"topic": topic, "case": name, **_outcome(case, fake)}), flush=True)


def _chosen(wanted: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in wanted or sorted(path.stem for path in (HERE / "cases").glob("[a-z]*.py")):
        topic, _, name = text.partition("::")
        found.setdefault(topic, []).extend([name] if name else [])
    return found


def _cases(topic: str) -> dict[str, Callable[[Any], None]]:
    module = importlib.import_module(f"fake_cuda.cases.{topic}")
    found: dict[str, Callable[[Any], None]] = {}
    for name, case in vars(module).items():
        if not name.startswith("case_"):
            continue
        if name in getattr(module, "NAMES", {}):
            found |= {f"{name}[{given}]": functools.partial(case, name=given) for given in module.NAMES[name]}
        else:
            found[name] = case
    return found


def _outcome(case: Callable[[Any], None], fake: Any) -> dict[str, Any]:
    """How a case ended. Counts and settings of the stand-in begin afresh in each."""
    fake.COUNT.restore()
    fake.COUNT.reset()
    began = time.process_time()
    error = None
    try:
        case(fake)
    except BaseException:
        error = "\n".join(traceback.format_exc().splitlines()[-2 * _LINES :])
    return {"ok": error is None, "error": error, "cpu_s": round(time.process_time() - began, 2), "counts": fake.COUNT.facts()}


if __name__ == "__main__":
    main(sys.argv[1:])
