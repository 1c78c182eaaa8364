"""Memory process: a module in processes of its own, one per rank, each of which answers with a file of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.harness.jobs import end_family
from fedmoe_ds.distributed.launcher import free_port

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
_TAIL = 3000
_TIMEOUT_S = 300.0


def answers(module: str, request: dict[str, Any], ranks: int = 1) -> list[dict[str, Any]]:
    """Run `python -m MODULE REQUEST FOLDER` on every rank and return what each has left in its file (`answer_file`).

    Raises:
        RuntimeError: a rank failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory(prefix="fedmoe-bench-") as folder:
        command = [sys.executable, *command_of(ranks), "-m", module, json.dumps(request), folder]
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment())
            try:
                process.wait(_TIMEOUT_S)
            finally:
                end_family(process)
        if process.returncode:
            tail = log.read_text(errors="replace")[-_TAIL:]
            raise RuntimeError(f"{module} on {ranks} ranks ended with exit code {process.returncode}:\n{tail}")
        return [json.loads(answer_file(Path(folder), rank).read_text()) for rank in range(ranks)]


def answer_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its answer."""
    return folder / f"answer-{rank}.json"


def command_of(ranks: int) -> list[str]:
    """What starts a module or a script on several ranks of this machine."""
    if ranks == 1:
        return []
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]


def environment() -> dict[str, str]:
    """This process's, for a process of one thread that no launcher has started."""
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHER} | _ONE_THREAD
