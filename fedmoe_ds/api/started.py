"""Started: runs in processes of their own, which the program that asked waits for; how they ended comes back in a file."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmoe_ds.config import Config, dump_config
from fedmoe_ds.distributed.launcher import detect_launch
from fedmoe_ds.distributed.supervisor import Supervisor
from fedmoe_ds.errors import EXIT_LOST, EXIT_STOPPED, EXIT_USER_ERROR, LostError, UserError
from fedmoe_ds.storage.strict_json import parse_json
from fedmoe_ds.terminal import note

WORKER = "fedmoe_ds.api.worker"


def start(jobs: Sequence[tuple[Config, str]], ranks: int, max_restarts: int = 0) -> list[str | None]:
    """Run configurations one after the other on new processes of this machine, which join one world.

    Args:
        jobs: (configuration, `never` or `auto` for resuming).
        max_restarts: starts after the first one, at most; each continues every job from its last checkpoint.
    Returns:
        For each job the name of the signal that ended it early, or None.
    Raises:
        UserError, LostError, RuntimeError: as `fedmoe_ds.run`.
        KeyboardInterrupt: SIGINT was heard here, and passed on.
    """
    launch = detect_launch()
    if launch.launcher != "python":
        raise UserError(f"ranks: {ranks}: {launch.launcher} has started the ranks already; leave ranks out")
    if max_restarts < 0:
        raise UserError(f"max_restarts: {max_restarts}: must be at least 0")
    with tempfile.TemporaryDirectory(prefix="fedmoe-") as name:
        folder = Path(name)
        for index, (config, resume) in enumerate(jobs):
            (folder / f"{index}.yaml").write_text(dump_config(config), encoding="utf-8")
            (folder / f"{index}.resume").write_text(resume, encoding="utf-8")
        # What this process can import its ranks can, too: a method that stands beside the program.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        from fedmoe_ds.checkpoint.skipped_clients import findings_of  # brings torch, which importing this package does not

        silence = max(config.topology.silence_s for config, _ in jobs)
        runs = [Path(config.output) / config.name for config, _ in jobs]
        command, variables = [sys.executable, "-m", WORKER, name], {"PYTHONPATH": path}
        supervisor = Supervisor(command, ranks, max_restarts, silence, note, variables, learnt=lambda: findings_of(runs))
        code = supervisor.run()
        if supervisor.asked == "SIGINT":
            raise KeyboardInterrupt("the run was asked to stop; resume='auto' continues it")
        return _endings(folder, len(jobs), code, supervisor.asked)


def _endings(folder: Path, jobs: int, code: int, asked: str | None) -> list[str | None]:
    if code in (0, EXIT_STOPPED):
        endings = [_read(folder / f"{index}.ending") for index in range(jobs)]
        # Where ranks were stopped while they started, none of them has told how.
        early = asked if code == EXIT_STOPPED else None
        return [ending.get("interrupted", early) for ending in endings]
    # The lowest rank's, as it is on standard error.
    told = [_read(path).get("error") for path in sorted(folder.glob("error-*"))]
    if code == EXIT_USER_ERROR:
        raise UserError(next(iter(told), None) or "run: a rank has met a mistake and told it on standard error; mend it")
    if code == EXIT_LOST:
        raise LostError("a rank was lost, standard error says which; the last checkpoint is intact: resume='auto' continues")
    raise RuntimeError(f"a rank failed with exit code {code}; its traceback is on standard error")


def tell(path: Path, **content: Any) -> None:
    """Write a file of an ending, in the place of that of an earlier start."""
    path.write_text(json.dumps(content), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """What a rank has told; nothing where it could not."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
