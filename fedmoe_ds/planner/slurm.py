"""SLURM: a run as a batch job: written as a batch script, submitted.

The script is `slurm/train.sbatch` with another header: what happens in a job is written down once, in the file that people
copy. Not submitit: it pickles a Python function and owns signals and requeueing inside of the tasks, whereas here srun starts
the same command as any other launcher does, and the batch script decides by its exit code.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe_ds.config import Config, find_config
from fedmoe_ds.errors import UserError
from fedmoe_ds.planner.batch_job import Checked, Request, check
from fedmoe_ds.shell import command_line, quoted
from fedmoe_ds.storage.files import make_folder, write_whole

PACKAGE = Path(__file__).resolve().parents[1]
TEMPLATE = PACKAGE / "slurm" / "train.sbatch"
"""In the repository `slurm` is a link to the folder that people look into; a wheel holds the files."""
END_OF_HEADER = "# --- end of header ---\n"
FLAGS = {
    "nodes": "--nodes",
    "ntasks": "--nodes and --tasks-per-node",
    "ntasks-per-node": "--tasks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-task",
    "cpus-per-gpu": "--cpus-per-gpu",
    "mem": "--mem",
    "partition": "--partition",
    "time": "--time",
    "account": "--account",
}
"""Options of sbatch that have a flag of their own."""
FIXED = ("array", "chdir", "open-mode", "output", "requeue", "no-requeue", "wrap")
"""Options of sbatch that the script relies on."""
HETEROGENEOUS = (":", "hetjob", "packjob", "het-group", "pack-group")
"""How sbatch is told of a job of several kinds of nodes."""
ONE_OF = (("cpus-per-task", "cpus-per-gpu"), ("mem", "mem-per-cpu", "mem-per-gpu"))
"""Options of which sbatch takes one; the last that is given replaces the others."""


@dataclass(frozen=True)
class Submitted:
    """A job in the queue, where its files will be, and what its check has found."""

    job: str
    script: Path
    output: Path
    logs: Path
    notes: Sequence[str] = ()


def compose(request: Request, found: Checked, home: Path, folder: Path) -> str:
    """The batch script: the template's header with this request's options, then the template.

    Args:
        home: the repository, or the folder into which the package is installed.
        folder: where job outputs and logs of ranks go; absolute.
    Raises:
        UserError: an option of sbatch that is none, that belongs to a flag or to the script, or whose value is no line of text;
            a folder whose name is none.
    """
    head, marker, body = TEMPLATE.read_text().partition(END_OF_HEADER)
    assert marker, "slurm/train.sbatch has lost the line that ends its header"
    # A dict keeps the template's order, and a request's option replaces the template's own.
    options: dict[str, str | None] = {
        match[1]: match[2] for match in re.finditer(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", head, re.MULTILINE)
    }
    logs = str(folder).replace("%", "%%")  # a percent sign stands for a part of the name
    _set(options, {"job-name": found.config.name, "chdir": str(Path.cwd()), "output": f"{logs}/%j.out"})
    _set(options, _asked(request, found))
    # Last, so that a site's own options win over the template's.
    _set(options, dict(_option(text) for text in request.sbatch))
    for key, value in options.items():
        if value is not None:
            _check_line(key, value)
    # sbatch takes quotes off a value as a shell does; a name with spaces needs them.
    lines = [f"#SBATCH --{key}" + ("" if value is None else f"={shlex.quote(value)}") for key, value in options.items()]
    words = command_line(["--config", str(find_config(request.config).resolve()), *request.overrides])
    places = {
        "FEDMOE_HOME": home,
        "FEDMOE_LAUNCH": PACKAGE / "commands",
        "FEDMOE_LOGS": folder,
        "FEDMOE_PYTHON": sys.executable,
    }
    # Absolute paths: SLURM runs a copy of the script, in its own spool folder.
    exports = [f"export {name}={quoted(str(place))}" for name, place in places.items()]
    first = ["#!/bin/bash", "# Written by fedmoe submit from slurm/train.sbatch; sbatch this file to submit the same again."]
    return "\n".join([*first, *lines, *exports, f'set -- {words} "$@"', ""]) + marker + body


def _asked(request: Request, found: Checked) -> dict[str, str | None]:
    """Options of sbatch that say what the job gets."""
    asked: dict[str, str | None] = {"nodes": str(request.nodes), "ntasks-per-node": str(request.tasks)}
    if request.gpus_per_node is not None:
        asked["gpus-per-node"] = request.gpus[0].option.partition("=")[2]
    if request.cpus_per_gpu is not None:
        asked["cpus-per-gpu"] = str(request.cpus_per_gpu)
    else:
        asked["cpus-per-task"] = str(request.cpus_per_task or found.cores)
    # Of a node, whatever the site counts by: `--sbatch mem-per-cpu=...` takes its place.
    asked["mem"] = request.mem or f"{found.mem}M"
    asked["signal"] = f"B:USR1@{found.lead}"
    for name in ("partition", "time", "account"):
        if (value := getattr(request, name)) is not None:
            asked[name] = value
    return asked


def _set(options: dict[str, str | None], given: Mapping[str, str | None]) -> None:
    """Let `given` replace options, and those that sbatch does not take beside them."""
    for key, value in given.items():
        for rivals in ONE_OF:
            for rival in rivals if key in rivals else ():
                options.pop(rival, None)
        options[key] = value


def _option(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    key = key.removeprefix("--")
    if key in HETEROGENEOUS:
        raise UserError(f"--sbatch: {text}: a heterogeneous job; all ranks need nodes of one kind: leave it out")
    if not re.fullmatch(r"[a-z][a-z-]*", key):
        raise UserError(f"--sbatch: {text}: is no option of sbatch; write key=value, for instance qos=high")
    if key in FLAGS:
        raise UserError(f"--sbatch: {text}: has a flag of its own; use {FLAGS[key]}")
    # The script restarts and finds its files by these; another value would break it silently.
    if key in FIXED:
        raise UserError(f"--sbatch: {text}: the script relies on it; leave it out")
    return key, value if equals else None


def _check_line(key: str, value: str) -> None:
    """Raise UserError unless a value can stand in the header: another line would be another option, or a command."""
    name = {"chdir": "working folder", "output": "output", "job-name": "name"}.get(key)
    name = name or (f"--{key}" if key in FLAGS else f"--sbatch: {key}")
    if not value or not value.isprintable():
        raise UserError(f"{name}: {value!r}: is empty or no line of text; give another")


def submit(request: Request, home: Path, environment: Mapping[str, str]) -> Submitted:
    """Check a request, write its script to <output>/slurm/<name>.sbatch and submit it.

    Args:
        home: the repository, or the folder into which the package is installed.
        environment: of sbatch, which passes it on to the job.
    Raises:
        UserError: a mistake in the configuration or in the request, no sbatch here, or sbatch refuses.
    """
    # Everything is checked here: a mistake found in the job would cost its time in the queue.
    found = check(request, environment)
    folder = log_folder(found.config)
    script = compose(request, found, home, folder)
    path = folder / f"{found.config.name}.sbatch"
    try:
        make_folder(folder)
        write_whole(path, script)
    except OSError as error:
        raise UserError(f"output: {path}: cannot be written: {error.strerror or error}; choose another output") from None
    job = _sbatch(path, environment)
    return Submitted(job, path, folder / f"{job}.out", folder / job, found.notes)


def log_folder(config: Config) -> Path:
    """Where scripts, job outputs and logs of ranks go, beside the runs."""
    return Path(config.output).resolve() / "slurm"


def _sbatch(path: Path, environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            "sbatch: not found: this machine is no client of SLURM; submit from a login node, or --dry-run"
        ) from None
    if done.returncode:
        # sbatch says `sbatch: error: ...`; the first line has the cause.
        said = [line.partition("error: ")[2] or line for line in done.stderr.splitlines()] or [f"exit code {done.returncode}"]
        raise UserError(f"sbatch: {path}: {said[0]}; change the options, or look at the script")
    # --parsable prints `job` or, with several clusters, `job;cluster`.
    return done.stdout.strip().split(";")[0]
