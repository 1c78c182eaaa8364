"""Ranks: a module on several ranks, each of which gets one request and leaves one answer, both in JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.process import run_to_end, scratch_folder, torchrun


def run_on_ranks(
    module: str, request: dict[str, Any], ranks: int = 1, launcher: list[str] | None = None, timeout_s: float = 300.0
) -> list[Any]:
    """Run `python -m MODULE REQUEST FOLDER` on every rank and return what each has left with `leave_answer`.

    Args:
        launcher: what comes before `-m`; torchrun where nothing is given.

    Raises:
        RuntimeError: a rank failed, or all of them take too long; with the end of their output.
    """
    with scratch_folder() as folder:
        command = [*(launcher or torchrun(ranks)), "-m", module, json.dumps(request), str(folder)]
        run_to_end(f"{module} on {ranks} ranks", command, timeout_s)
        return [json.loads(_answer_file(folder, rank).read_text()) for rank in range(ranks)]


def read_request() -> Any:
    """In a rank: what it was asked."""
    return json.loads(sys.argv[1])


def leave_answer(answer: Any, rank: int = 0) -> None:
    """In a rank: its answer; numbers of numpy are stored as Python's."""
    _answer_file(Path(sys.argv[2]), rank).write_text(json.dumps(answer, default=float))


def _answer_file(folder: Path, rank: int) -> Path:
    return folder / f"answer-{rank}.json"
