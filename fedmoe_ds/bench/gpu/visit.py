"""Visit: steps one after the other, each a process with a limit; what each has found is told and stored as it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedmoe_ds.bench.gpu.request import Request, Tell
from fedmoe_ds.bench.gpu.steps import MODEL, MODULE, STEPS
from fedmoe_ds.bench.harness import table
from fedmoe_ds.bench.harness.process import environment, kill_process_tree, module_command, scratch_folder, start
from fedmoe_ds.bench.harness.repeats import make_row
from fedmoe_ds.bench.harness.shapes import Shape, find_shape
from fedmoe_ds.bench.harness.table import Row
from fedmoe_ds.errors import UserError
from fedmoe_ds.storage.files import open_plain
from fedmoe_ds.terminal import show

DOCUMENT, LINES = "gpu.json", "results.jsonl"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LEAST_S = 5
"""Less time is none: a process has barely imported torch by then."""
_MEMORY = Path("/dev/shm")  # noqa: S108  (what lies there is in a folder of this process's own)
_ROOM = 1.2  # of the weights' bytes, for a model that is kept in memory


@dataclass
class Visit:
    """One visit. `rows` are its results so far, one per step."""

    request: Request
    command: str
    limit_s: float
    rows: list[Row] = field(default_factory=list)

    def run(self, names: Sequence[str]) -> list[Row]:
        """Run steps. A signal ends the one that runs; what it has told, and all before it, is kept."""
        until = time.monotonic() + self.limit_s
        for place, name in enumerate(names):
            reserved = sum(STEPS[later].limit_s for later in names[place + 1 :])
            limit = allowed(STEPS[name].limit_s, until - time.monotonic(), reserved)
            if limit < LEAST_S:
                self._keep(name, 0.0, f"not run: the {self.limit_s:.0f} s of the visit are over", [])
            else:
                self._step(name, limit)
        return self.rows

    def _step(self, name: str, limit_s: float) -> None:
        output, began = Path(self.request.output), time.monotonic()
        tell, log = Tell(output / f"{name}.jsonl"), output / f"{name}.log"
        error: str | None = "stopped"
        try:
            with open(open_plain(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC), "wb") as out:
                words = module_command(MODULE, name, json.dumps(asdict(self.request)), str(tell.file))
                error = _end_of(start(words, out, environment({"DS_ACCELERATOR": "cuda"})), limit_s, log)
            if error is None and not tell.told():
                error = "it ended well, and told nothing"
        finally:
            # After a signal, too: that is an exception here.
            self._keep(name, time.monotonic() - began, error, tell.told())
            tell.file.unlink(missing_ok=True)
        if error is None:
            log.unlink()

    def _keep(self, name: str, seconds: float, error: str | None, found: list[dict[str, object]]) -> None:
        """Store and tell the result of a step: first store, since nobody may listen any more."""
        line = json.dumps({"step": name, "seconds": round(seconds, 1), "error": error, "found": found})
        facts: dict[str, Any] = {"step": name, "device": "cuda", "seconds": seconds, "error": error, "found": found}
        self.rows.append(make_row(self.request.shape, "gpu", None, **facts))
        output = Path(self.request.output)
        with _undisturbed():
            with (output / LINES).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            table.write_json(table.document("gpu", self.command, self.rows), output / DOCUMENT)
        show(line)
        sys.stdout.flush()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait until the block is left. A mask would be this thread's alone, and others of the process would take them."""
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for asked in heard:
            signal.raise_signal(asked)


def allowed(own_s: float, left_s: float, reserved_s: float) -> float:
    """Seconds for a step: its own, and what is left of all beside those that later steps have for themselves."""
    return max(min(own_s, left_s), left_s - reserved_s)


def _end_of(process: subprocess.Popen[str], limit_s: float, log: Path) -> str | None:
    """Wait for a step; None where all went well, else why not. Nothing of it runs on."""
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"over its limit of {limit_s:.0f} s"
    finally:
        kill_process_tree(process)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return None if code == 0 else f"{lines[-1].strip() if lines else f'exit code {code}, and it said nothing'}"


def chosen(steps: Sequence[str]) -> list[str]:
    """The steps with these names, in order of value; the model comes before the first that needs it."""
    wanted = set(steps)
    if any(STEPS[name].needs_model for name in wanted):
        wanted.add(MODEL)
    return [name for name in STEPS if name in wanted]


def visit(shape: str, steps: Sequence[str], output: Path, limit_s: float, seed: int, command: str) -> list[Row]:
    """Run steps with a model that is gone afterwards, and leave results in a folder."""
    names = chosen(steps)
    with scratch_folder("fedmoe-gpu-", _place(find_shape(shape), output)) as folder:
        request = Request(shape, str(folder / "model"), str(output), seed)
        clear(request, names)
        return Visit(request, command, limit_s).run(names)


def clear(request: Request, names: Sequence[str]) -> None:
    """Remove what these steps have left in an earlier visit: it must not pass for this one's, also of a step that fails, or for
    which there is no time. Raises UserError before anything is removed, or for what cannot be."""
    output = Path(request.output)
    found = [output / name for name in (DOCUMENT, LINES, *(f"{name}.{end}" for name in names for end in ("log", "jsonl")))]
    found += [path for name in names for path in STEPS[name].results(request)]
    for path in found:
        # A visit's folder holds the configuration of its run. Another one may be a run of the user's, in `--output runs`.
        if path.is_dir() and not (path / f"{path.name}.yaml").is_file():
            raise UserError(f"--output: {output}: holds a folder {path.name}, which is no visit's; give another folder")
    for path in found:
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--output: {path}: cannot be removed: {error.strerror or error}; give another folder") from None


def _place(shape: Shape, output: Path) -> Path:
    """Where the model lies: in memory, where that has room, since every step reads it."""
    matrices = shape.layers * (3 * shape.experts * shape.ffn + 4 * shape.hidden) + 2 * shape.vocab
    there = _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK)
    return _MEMORY if there and shutil.disk_usage(_MEMORY).free > _ROOM * 2 * matrices * shape.hidden else output
