"""SLURM: a run as a batch job: checked, written as a batch script, submitted.

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

from fedmoe_ds.config import Config, find_config, load_config
from fedmoe_ds.errors import UserError
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
    "partition": "--partition",
    "time": "--time",
    "account": "--account",
}
"""Options of sbatch that have a flag of their own."""
FIXED = ("array", "chdir", "open-mode", "output", "requeue", "no-requeue", "wrap")
"""Options of sbatch that the script relies on."""


@dataclass(frozen=True)
class Request:
    """What to run and on what; `gpus_per_node` means one task per GPU, `sbatch` are further options: `key=value` or `key`."""

    config: Path
    overrides: Sequence[str] = ()
    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: int | None = None
    partition: str | None = None
    time: str | None = None
    account: str | None = None
    sbatch: Sequence[str] = ()

    @property
    def tasks(self) -> int:
        """Ranks per node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks


@dataclass(frozen=True)
class Submitted:
    """A job in the queue and where its files will be."""

    job: str
    script: Path
    output: Path
    logs: Path


def check(request: Request) -> Config:
    """The configuration of a request. Raises UserError for everything that the job would be refused for on so many ranks."""
    for flag in ("nodes", "tasks_per_node", "gpus_per_node"):
        count = getattr(request, flag)
        if count is not None and count < 1:
            raise UserError(f"--{flag.replace('_', '-')}: {count}: is no number of them; give at least 1")
    config = load_config(request.config, request.overrides)
    if config.topology.device == "cuda" and not _asks_for_gpus(request):
        raise UserError("topology.device: cuda: the job asks for no GPU; add --gpus-per-node, or use auto or cpu")
    from fedmoe_ds.planner.dry_run import describe  # heavy: it builds the model, without weights

    # Where the job runs there are the GPUs that it asks for, whatever is here.
    device = config.topology.device
    on_gpus = device == "cuda" or (device == "auto" and _asks_for_gpus(request))
    describe(config, request.ranks, "cuda" if on_gpus else "cpu")
    return config


def _asks_for_gpus(request: Request) -> bool:
    """Whether the job gets GPUs, for its nodes or for each task: sbatch has several options for it."""
    return request.gpus_per_node is not None or any(_gpus(text.removeprefix("--")) for text in request.sbatch)


def _gpus(option: str) -> int:
    """How many GPUs an option of sbatch asks for, for whatever it counts by: `gpus-per-task=a100:2`, `gres=gpu:2,nvme:1`,
    `tres-per-task=cpu:4,gres/gpu=1`."""
    key, _, value = option.partition("=")
    if re.fullmatch(r"gpus(-per-[a-z]+)?", key):
        asked = [("gpu", *part.split(":")) for part in value.split(",")]
    elif re.fullmatch(r"gres|tres-per-[a-z]+", key):
        asked = [tuple(re.split("[:=]", part.removeprefix("gres/").removeprefix("gres:"))) for part in value.split(",")]
    else:
        return 0
    # name[:type][:count]; without a count it is one.
    return sum(int(last) if (last := part[-1]).isdigit() else 1 for part in asked if part[0] == "gpu")


def compose(request: Request, config: Config, home: Path, folder: Path) -> str:
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
    options |= {"job-name": config.name, "chdir": str(Path.cwd()), "output": f"{logs}/%j.out"}
    options |= {"nodes": str(request.nodes), "ntasks-per-node": str(request.tasks)}
    if request.gpus_per_node is not None:
        options["gpus-per-node"] = str(request.gpus_per_node)
    for name in ("partition", "time", "account"):
        if (value := getattr(request, name)) is not None:
            options[name] = value
    # Last, so that a site's own options win over the template's.
    options |= dict(_option(text) for text in request.sbatch)
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


def _option(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    key = key.removeprefix("--")
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
    config = check(request)
    folder = log_folder(config)
    script = compose(request, config, home, folder)
    path = folder / f"{config.name}.sbatch"
    try:
        make_folder(folder)
        write_whole(path, script)
    except OSError as error:
        raise UserError(f"output: {path}: cannot be written: {error.strerror or error}; choose another output") from None
    job = _sbatch(path, environment)
    return Submitted(job, path, folder / f"{job}.out", folder / job)


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
